"""The front pages of the families: every public function with its formula, shapes, errors and example."""
