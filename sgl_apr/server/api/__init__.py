"""sgl_apr/server/api"""
