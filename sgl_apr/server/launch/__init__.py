"""sgl_apr/server/launch"""
