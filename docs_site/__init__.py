"""The documents' site: the pages made from the code, and what mkdocs needs besides its own."""
