"""sgl_apr/formats/masks"""
