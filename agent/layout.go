package agent

import (
	"cmp"
	"crypto/x509"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/config"
)

// Layout checks a configuration as [Check] does, and returns what it says of the
// machine. It reads the bundle that an earlier run left in the data directory,
// if it may.
func Layout(src config.Source) (config.Layout, error) {
	s, err := load(src)
	if err != nil {
		return config.Layout{}, err
	}
	l := config.Layout{
		TrustDomain: s.td.Name(),
		AdminSocket: s.AdminSocket,
		DataDirs:    []string{s.DataDir},
		Connections: cmp.Or(s.Limits.Connections, endpoint.DefaultConnections),
		Descriptors: 2, // one for the connection, one that pins its process
		Socket:      s.Socket,
		Server:      s.Server,
	}
	if saved, err := node.SavedBundle(s.DataDir, s.td); err == nil {
		l.Authorities = append(l.Authorities, authorities(saved)...)
	}
	l.Authorities = append(l.Authorities, authorities(s.trust)...)
	return l, nil
}

func authorities(b *bundle.Bundle) (out []*x509.Certificate) {
	if b == nil {
		return nil
	}
	for _, a := range b.X509Authorities {
		out = append(out, a.Certificate)
	}
	return out
}
