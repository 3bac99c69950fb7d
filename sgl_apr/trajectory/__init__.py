"""sgl_apr/trajectory"""
