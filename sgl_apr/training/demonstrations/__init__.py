"""Chat demonstrations for a language model that decides to fork: multi-part questions fork, single ones do not."""
