"""sgl_apr/server/cpu"""
