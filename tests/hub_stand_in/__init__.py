"""A stand-in for the Hugging Face Hub on loopback, written against huggingface_hub's client and used only through it.

It knows models, not data sets or spaces, and stores large files by git-lfs. It does not speak Xet: huggingface_hub uploads
by Xet wherever hf_xet is installed, without asking the server, so it has to be told ``HF_HUB_DISABLE_XET=1``; it downloads
by Xet only what the server offers so.
"""

from hub_stand_in.faults import Corruption, Cut, Event, Failure
from hub_stand_in.hub import TOKEN, HubStandIn
from hub_stand_in.repositories import Account, Repository

__all__ = ["TOKEN", "Account", "Corruption", "Cut", "Event", "Failure", "HubStandIn", "Repository"]
