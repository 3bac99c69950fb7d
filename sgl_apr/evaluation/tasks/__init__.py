"""sgl_apr/evaluation/tasks"""
