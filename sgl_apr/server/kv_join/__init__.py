"""sgl_apr/server/kv_join"""
