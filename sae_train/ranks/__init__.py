"""How ranks find and speak to each other: the only room that talks to the process group."""
