"""Editor and judge as HTTP services, and the clients that ask them. The schema of both is `wire`."""
