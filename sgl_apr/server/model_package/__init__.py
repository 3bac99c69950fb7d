"""A package of model classes, as SGLang's `SGLANG_EXTERNAL_MODEL_PACKAGE` takes it, with the class of one model."""
