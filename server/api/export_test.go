package api

import (
	"context"

	"google.golang.org/grpc"
)

// Services returns what is registered on the TCP listener and on the admin
// socket.
func Services(a *API) (tcp, admin map[string]grpc.ServiceInfo) {
	return a.tcp.GetServiceInfo(), a.admin.GetServiceInfo()
}

// Methods returns the names of the table of who may call what.
func Methods() (names []string) {
	for name := range methods {
		names = append(names, name)
	}
	return names
}

// NewTurns returns what begins one of n turns.
func NewTurns(n int) func(context.Context) (end func(), err error) { return make(turns, n).begin }
