"""The mathematics: a plain-torch reference, and the operators that training uses.

Words: q, ``packed``, ``skew_in`` and ``skew_out`` are upper triangles of skew blocks, the parameters of a rotation; G
is the orthogonal block made of one. W' is the frozen weight as it is stored, rows and columns permuted
(``base_weight``, or codes in ``packed_weight``). Shapes are in names: ``x_NF`` is [N, F].
"""
