"""Where programs run that a model wrote: `process` is the outside, `jail` what is shut, `repl` what runs inside."""
