// Package cluster makes the servers of a trust domain keep its store together,
// with nothing else to install: each runs a member of an etcd cluster in its
// own process.
//
// [Start] starts this server's [Member]: that of an earlier start, or the first
// of a new cluster. A further server is let in by one that is there, against an
// invitation ([Invite], [Member.Admit]), and calls [Join] before its first
// Start. Members talk over mutual TLS with certificates that they make
// themselves, from an authority that is handed over at joining.
package cluster

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

// Options say where and as whom a member runs.
type Options struct {
	Dir       string // of its files; it is made
	Name      string // the server's
	Listen    string // host:port for the other members
	Advertise string // host:port by which they reach it
	Quota     int64  // bytes that the store may have; 0: DefaultQuota
	Log       *slog.Logger
}

// DefaultQuota is how large the store may get, in bytes: some millions of
// entries.
const DefaultQuota = 8 << 30

// Member is this server's member of the cluster.
type Member struct {
	o    Options
	ca   *ca
	etcd *embed.Etcd
}

// changeTime bounds a change of the cluster's members. Etcd makes none until it
// has been in touch with all of them for five seconds.
const changeTime = 15 * time.Second

// errRemoved: this server's member is not one any more.
var errRemoved = errors.New("this server has been removed from its cluster")

// Start starts the member and returns once it takes part: for that, a majority
// of the members must be there. If there is none of an earlier start, and
// [Join] was not called, a new cluster begins.
func Start(ctx context.Context, o Options) (*Member, error) {
	m, err := start(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("start this server's member of the cluster: %w", err)
	}
	return m, nil
}

func start(ctx context.Context, o Options) (*Member, error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	authority, err := o.loadCA()
	if err != nil {
		return nil, err
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.cert.Raw})
	if err := writeFile(o.rootFile(), root); err != nil {
		return nil, err
	}
	if err := o.renew(authority, true, time.Now()); err != nil {
		return nil, err
	}
	c, err := o.config()
	if err != nil {
		return nil, err
	}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return nil, err
	}
	m := &Member{o: o, ca: authority, etcd: e}
	if err := m.takePart(ctx); err != nil {
		e.Close()
		return nil, err
	}
	return m, nil
}

// config is etcd's.
func (o Options) config() (*embed.Config, error) {
	c := embed.NewConfig()
	c.Name = o.Name
	c.Dir = o.dataDir()
	c.ListenPeerUrls = []url.URL{peerURL(o.Listen)}
	c.AdvertisePeerUrls = []url.URL{peerURL(o.Advertise)}
	c.ListenClientUrls, c.AdvertiseClientUrls = nil, nil // the only client is this process
	c.InitialCluster = o.Name + "=" + c.AdvertisePeerUrls[0].String()
	members, err := os.ReadFile(o.membersFile())
	switch {
	case err == nil: // Join was called; without effect on a member that has started
		c.InitialCluster, c.ClusterState = string(members), embed.ClusterStateFlagExisting
	case !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	c.PeerTLSInfo = transport.TLSInfo{
		CertFile: o.certFile(), KeyFile: o.certFile(), TrustedCAFile: o.rootFile(),
		ClientCertAuth: true,
		// The authority certifies members and nothing else; they may be behind
		// addresses that are not in their certificates.
		SkipClientSANVerify: true,
	}
	c.TlsMinVersion = "TLS1.3"
	c.QuotaBackendBytes = o.Quota
	if c.QuotaBackendBytes == 0 {
		c.QuotaBackendBytes = DefaultQuota
	}
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(etcdLog(o.Log))
	return c, nil
}

func peerURL(address string) url.URL { return url.URL{Scheme: "https", Host: address} }

// takePart waits until the member is ready, and has a vote.
func (m *Member) takePart(ctx context.Context) error {
	tell := time.NewTicker(10 * time.Second)
	defer tell.Stop()
	ready := m.etcd.Server.ReadyNotify()
	try := time.NewTicker(500 * time.Millisecond)
	defer try.Stop()
	for {
		select {
		case <-ready:
			ready = nil
		case <-try.C:
			if ready != nil {
				continue
			}
			if !m.etcd.Server.IsLearner() {
				return nil
			}
			ctx, cancel := context.WithTimeout(ctx, changeTime)
			_, err := m.etcd.Server.PromoteMember(ctx, uint64(m.etcd.Server.MemberID()))
			cancel()
			if err != nil {
				m.o.Log.Debug("this server is still catching up with the cluster", "error", err)
			}
		case <-tell.C:
			m.o.Log.Warn("waiting for the other servers of the cluster: a majority of them must be there", "name", m.o.Name, "listen", m.o.Listen)
		case err := <-m.etcd.Err():
			return err
		case <-m.etcd.Server.StopNotify():
			return fmt.Errorf("%w; to join again, delete %s and use a new invitation", errRemoved, m.o.Dir)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Run keeps the member's certificate current, and ends connections to other
// members that have fallen silent, until the context ends or the member does.
func (m *Member) Run(ctx context.Context) error {
	day := time.NewTicker(24 * time.Hour)
	defer day.Stop()
	look := time.NewTicker(silenceLook)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.etcd.Server.StopNotify():
			return errRemoved
		case err := <-m.etcd.Err():
			return fmt.Errorf("this server's member of the cluster has failed: %w", err)
		case <-look.C:
			if err := m.endSilent(); err != nil {
				m.o.Log.Debug("connections between servers may stay though they are silent", "error", err)
			}
		case <-day.C:
			if err := m.o.renew(m.ca, false, time.Now()); err != nil {
				m.o.Log.Error("the certificate for the other servers of the cluster cannot be renewed; trying again tomorrow", "error", err)
			}
		}
	}
}

// Client returns a client of the cluster, over this member.
func (m *Member) Client() *clientv3.Client { return v3client.New(m.etcd.Server) }

// Close stops the member. Clients must be closed before.
func (m *Member) Close() { m.etcd.Close() }

// Peer is a member of the cluster, as the cluster knows it.
type Peer struct {
	ID      uint64
	Name    string // empty: it has not started yet
	Address string
	Learner bool
	Leader  bool
}

// Peers returns the cluster's members, by name, as far as this one knows.
func (m *Member) Peers() []Peer {
	var peers []Peer
	leader := m.etcd.Server.Leader()
	for _, p := range m.etcd.Server.Cluster().Members() {
		peers = append(peers, Peer{
			ID: uint64(p.ID), Name: p.Name, Address: address(p.PeerURLs), Learner: p.IsLearner, Leader: p.ID == leader,
		})
	}
	slices.SortFunc(peers, func(a, b Peer) int { return strings.Compare(a.Name+" "+a.Address, b.Name+" "+b.Address) })
	return peers
}

func address(urls []string) string {
	if len(urls) == 0 {
		return ""
	}
	return strings.TrimPrefix(urls[0], "https://")
}

// Errors of a change of the members that its caller can do something about.
var (
	ErrNameTaken = errors.New("the cluster has a server of that name, or at that address")
	ErrNotReady  = errors.New("the cluster cannot change its members now: all but one of them must be there, and the last that joined must have caught up")
	ErrNoServer  = errors.New("the cluster has no server of that name")
	ErrLast      = errors.New("it is the cluster's only server")
)

// Admission is what a server needs to join.
type Admission struct {
	CACertificate []byte // DER
	CAKey         []byte // PKCS #8
	Members       []Peer // the new one among them
}

// Remove takes a server out of the cluster, for good.
func (m *Member) Remove(ctx context.Context, name string) error {
	peers := m.Peers()
	i := slices.IndexFunc(peers, func(p Peer) bool { return p.Name == name || p.Name == "" && p.Address == name })
	switch {
	case i < 0:
		return ErrNoServer
	case len(peers) == 1:
		return ErrLast
	}
	err := m.change(ctx, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.MemberRemove(ctx, peers[i].ID)
		return err
	})
	if err != nil && m.etcd.Server.IsIDRemoved(peers[i].ID) { // this one, which ended before it was answered
		return nil
	}
	return err
}

// change makes a change of the members, again while the cluster is not ready for
// one.
func (m *Member) change(ctx context.Context, do func(context.Context, *clientv3.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	client := m.Client()
	defer client.Close()
	for {
		err := do(ctx, client)
		if !errors.Is(err, rpctypes.ErrUnhealthy) && !errors.Is(err, rpctypes.ErrTooManyLearners) {
			return changeError(err)
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return changeError(err)
		}
	}
}

// changeError says what an error of a change of the members means.
func changeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, rpctypes.ErrPeerURLExist), errors.Is(err, rpctypes.ErrMemberExist):
		return ErrNameTaken
	case errors.Is(err, rpctypes.ErrMemberNotFound):
		return ErrNoServer
	}
	return fmt.Errorf("%w (%v)", ErrNotReady, err)
}
