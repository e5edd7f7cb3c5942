from .op import maxsim as maxsim
