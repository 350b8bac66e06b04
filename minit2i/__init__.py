"""minit2i: text-to-image by next-token prediction.

picture --vq--> codes;  caption + codes --gpt--> next code;  sample joins the two.
"""
