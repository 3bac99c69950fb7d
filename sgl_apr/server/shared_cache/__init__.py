"""Groups of workers that decode together, each reading the tokens of all: Group Think and Hogwild! inside SGLang."""
