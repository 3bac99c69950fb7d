"""`/v1/responses` and `/v1/messages` with `apr`."""
