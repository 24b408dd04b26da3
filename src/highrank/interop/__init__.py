"""To and from other libraries' formats: PEFT, Hugging Face models, lm-eval: imports `train` and below."""
