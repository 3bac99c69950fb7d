"""sgl_apr/evaluation/tasks/countdown"""
