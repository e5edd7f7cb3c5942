from .op import bi_wkv as bi_wkv
