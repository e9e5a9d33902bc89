"""How the committed weights of the embedded vision models were made."""
