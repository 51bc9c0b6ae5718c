"""Training: fine-tune under a plan, and learn bit-widths by gradient.

``finetune`` trains a model whose layers are quantized as given; ``learn`` finds the bit-widths by
gradient under a hard limit on size, and then fine-tunes.
"""
