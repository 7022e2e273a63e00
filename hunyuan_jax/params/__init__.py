"""How a parameter is declared, and the tree of all of them."""
