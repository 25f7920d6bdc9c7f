"""How a classifier is trained: the Keras model that does, its optimizer, records and averages."""
