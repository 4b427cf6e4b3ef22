"""The context mixers, which bring the earlier positions into a block.

    mean       h_i = mean(u_0 .. u_i),  u = n Wc + bc                       the published block
    decay      h_i = lam h_(i-1) + (1 - lam) u_i,  u = LN(x) Wc + bc,  lam = sigmoid(d)
    gated      as decay, with lam_i = sigmoid(d + n_i Wd);  h = (h_i * silu(n Wg)) Wo
    attention  h = Attention(LN(x)): grouped queries, rotary positions, normalised q and k

A mixer maps (stream, state, tokens) to (context, new state). The state is what decoding keeps of
the earlier tokens, zero before the first; in training it is None. A new mixer is a module here, and
an entry in `MIXERS` in `language_model.py`.
"""
