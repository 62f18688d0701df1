package server

import (
	"cmp"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server/api"
)

// Layout checks a configuration as [Check] does, and returns what it says of the
// machine.
func Layout(src config.Source) (config.Layout, error) {
	s, err := load(src)
	if err != nil {
		return config.Layout{}, err
	}
	l := config.Layout{
		TrustDomain: s.TrustDomain,
		AdminSocket: s.AdminSocket,
		Connections: cmp.Or(s.Limits.Connections, api.DefaultConnections),
		Descriptors: 1,
	}
	if s.Store.Badger != nil {
		l.DataDirs = append(l.DataDirs, s.Store.Badger.Dir)
	}
	if c := s.Store.Etcd; c != nil && c.Embedded != nil {
		l.DataDirs = append(l.DataDirs, c.Embedded.Dir)
	}
	if s.Keys.Disk != nil {
		l.DataDirs = append(l.DataDirs, s.Keys.Disk.Dir)
	}
	return l, nil
}
