"""sgl_apr/runtime/frontend"""
