"""Before the first step: checks of the request, allowed changes of settings, and the state that the run starts from."""
