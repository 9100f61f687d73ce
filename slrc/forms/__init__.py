"""How a layer with zeros is run: forms, packed weights, and the operators that packed layers become."""
