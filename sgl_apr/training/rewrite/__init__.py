"""sgl_apr/training/rewrite"""
