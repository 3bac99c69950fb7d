"""sgl_apr/formats"""
