"""The Tinker protocol in front of an engine on this machine: scripts written for the hosted service run here."""
