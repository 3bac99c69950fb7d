"""Tasks with exact verifiers, and what models do with them; nothing is trained here."""
