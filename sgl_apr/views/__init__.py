"""sgl_apr/views"""
