package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/pkg/join"
	"github.com/hallmark-id/hallmark/pkg/version"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/api"
	"github.com/hallmark-id/hallmark/server/cluster"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/server/store/etcd"
)

const (
	peerPort   = "8082"
	etcdPrefix = "hallmark/"

	// connectTime is how long a cluster that is run apart has to answer at the
	// start.
	connectTime = 30 * time.Second
)

// fillEtcd fills what is not said of a shared store.
func (s *settings) fillEtcd() {
	c := s.Store.Etcd
	if c == nil {
		return
	}
	if c.Embedded == nil && len(c.Endpoints) == 0 {
		c.Embedded = &EmbeddedConfig{}
	}
	e := c.Embedded
	if e == nil {
		return
	}
	if e.Listen == "" {
		if host, _, err := net.SplitHostPort(s.Listen); err == nil {
			e.Listen = net.JoinHostPort(host, peerPort)
		}
	}
	if e.Advertise == "" {
		e.Advertise = e.Listen
	}
	if e.Dir == "" {
		e.Dir = filepath.Join(s.DataDir, "etcd")
	}
}

// checkEtcd finds what cannot be meant of a shared store.
func (s *settings) checkEtcd(wrong func(path, format string, args ...any)) {
	c := s.Store.Etcd
	if c == nil {
		return
	}
	if c.Embedded != nil && len(c.Endpoints) > 0 {
		wrong("store.etcd", "store.etcd has endpoints and embedded; choose one")
	}
	for i, endpoint := range c.Endpoints {
		u, err := url.Parse(endpoint)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Path != "" {
			wrong(fmt.Sprint("store.etcd.endpoints.", i), "endpoint %q is none of etcd; write https://host:port", endpoint)
		} else if u.Scheme == "http" && !loopback(u.Hostname()) {
			wrong(fmt.Sprint("store.etcd.endpoints.", i), "endpoint %q is not protected: whoever is in between could make himself any identity; write https://host:port", endpoint)
		}
	}
	if (c.Cert == "") != (c.Key == "") {
		wrong("store.etcd", "store.etcd has a cert or a key, and needs both or none")
	}
	e := c.Embedded
	if e == nil {
		return
	}
	if _, err := hostPort(e.Listen); err != nil {
		wrong("store.etcd.embedded.listen", "listen: %v; write host:port, for example 10.0.0.1:%s", err, peerPort)
	}
	host, err := hostPort(e.Advertise)
	ip, _ := netip.ParseAddr(host)
	switch {
	case err != nil:
		wrong("store.etcd.embedded.advertise", "advertise: %v; write the host:port that the other servers dial", err)
	case host == "" || ip.IsUnspecified() || strings.HasSuffix(e.Advertise, ":0"):
		wrong("store.etcd.embedded.advertise", "advertise %q is no address that another server can dial; write its host and port", e.Advertise)
	}
	if e.Quota < 0 || e.Quota > 0 && e.Quota < 16<<20 {
		wrong("store.etcd.embedded.quota", "quota is %d bytes; it is at least %d, or 0 for the default", e.Quota, 16<<20)
	}
	if e.Join != "" {
		if s.join, err = join.Parse(e.Join); err != nil {
			wrong("store.etcd.embedded.join", "join: %v", err)
		} else if s.join.TrustDomain != s.td {
			wrong("store.etcd.embedded.join", "the invitation is to trust domain %q, and trust_domain is %q", s.join.TrustDomain.Name(), s.TrustDomain)
		}
	}
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// opened is a store that was opened, and what it stands on.
type opened struct {
	store.Store
	shared *etcd.DB        // the same, if servers share it
	member *cluster.Member // this server's, if they keep it themselves
}

// Close closes the store and what it stands on.
func (o *opened) Close() error {
	err := o.Store.Close()
	if o.member != nil {
		o.member.Close()
	}
	return err
}

// leads returns what says whether this server does what one has to do for all;
// nil, if it is alone.
func (o *opened) leads() func() bool {
	if o.shared == nil {
		return nil
	}
	return o.shared.Leads
}

// cluster returns the servers that share the store; nil, if this one is alone.
func (o *opened) cluster(name string) *api.Cluster {
	if o.shared == nil {
		return nil
	}
	return &api.Cluster{Name: name, Store: o.shared, Member: o.member}
}

// announced is what the other servers learn of this one.
func (s *settings) announced(name string, tcp net.Listener) etcd.Server {
	return etcd.Server{Name: name, Address: cmp.Or(s.Advertise, tcp.Addr().String()), Version: version.String(), Since: time.Now().Truncate(time.Second)}
}

// addresses are those of servers that agents can dial: one that listens
// everywhere and does not say where it is reached has none.
func addresses(list []etcd.Server) *hallmarkv1.Servers {
	told := &hallmarkv1.Servers{}
	for _, s := range list {
		if host, err := hostPort(s.Address); err == nil {
			if ip, err := netip.ParseAddr(host); host != "" && (err != nil || !ip.IsUnspecified()) {
				told.Addresses = append(told.Addresses, s.Address)
				if s.Arrival > told.Arrival {
					told.Last, told.Arrival = s.Address, s.Arrival
				}
			}
		}
	}
	return told
}

// openStore opens the store that is configured, of the server of a name, for a
// writer: two of one name cannot have it open.
func (s *settings) openStore(ctx context.Context, name, writer string, log *slog.Logger, counted *metrics.Metrics) (*opened, error) {
	if s.Store.Etcd != nil {
		return s.openEtcd(ctx, name, writer, log, counted)
	}
	o := badger.Options{InMemory: true, Log: log, Metrics: counted}
	if b := s.Store.Badger; b != nil {
		o = badger.Options{Dir: b.Dir, MemTable: b.MemTable, Log: log, Metrics: counted}
	}
	st, err := badger.Open(o)
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w; set data_dir to a directory that this user may write to", err)
	}
	return &opened{Store: st}, err
}

func (s *settings) openEtcd(ctx context.Context, name, writer string, log *slog.Logger, counted *metrics.Metrics) (*opened, error) {
	c, out := s.Store.Etcd, &opened{}
	o := etcd.Options{Prefix: etcdPrefix, Name: writer, Log: log, Metrics: counted}
	var err error
	if e := c.Embedded; e != nil {
		member := cluster.Options{Dir: e.Dir, Name: name, Listen: e.Listen, Advertise: e.Advertise, Quota: e.Quota, Log: log}
		if s.join != nil {
			if err := cluster.Join(ctx, member, s.join); err != nil {
				return nil, err
			}
		}
		if out.member, err = cluster.Start(ctx, member); err != nil {
			return nil, err
		}
		o.Client = out.member.Client()
	} else if o.Client, err = etcd.Dial(etcd.Cluster{Endpoints: c.Endpoints, CA: c.CA, Cert: c.Cert, Key: c.Key}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	if out.shared, err = etcd.Open(ctx, o); err != nil {
		if out.member != nil {
			out.member.Close()
		}
		return nil, err
	}
	out.Store = out.shared
	return out, nil
}
