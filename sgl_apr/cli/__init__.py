"""sgl_apr/cli"""
