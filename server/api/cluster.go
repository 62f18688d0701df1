package api

import (
	"context"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/cluster"
	"github.com/hallmark-id/hallmark/server/store/etcd"
)

// Cluster is the servers that share a store.
type Cluster struct {
	Name   string          // this server's
	Store  *etcd.DB        // the one they share
	Member *cluster.Member // this server's; nil: others keep the store
}

// clusterService is about the servers that rule the trust domain together.
type clusterService struct {
	hallmarkv1.UnsafeClusterServiceServer // every call is here: one that is missing does not compile
	*API
}

// Bounds of what a server that joins says of itself.
const (
	maxServerName  = 63
	maxPeerAddress = 255
)

// member returns this server's member, if the servers keep the store themselves.
func (s *clusterService) member() (*cluster.Member, error) {
	switch {
	case s.cluster == nil:
		return nil, callErrorf(codes.FailedPrecondition, "this server is alone: its store is not one that servers share; \"hallmark server migrate\" moves it to one")
	case s.cluster.Member == nil:
		return nil, callErrorf(codes.FailedPrecondition, "the servers share an etcd cluster that is run apart; add a server by giving it the same store in its configuration")
	}
	return s.cluster.Member, nil
}

// ListServers lists the servers, by name.
func (s *clusterService) ListServers(context.Context, *hallmarkv1.ListServersRequest) (*hallmarkv1.ListServersResponse, error) {
	if s.cluster == nil {
		_, err := s.member()
		return nil, err
	}
	resp := &hallmarkv1.ListServersResponse{Name: s.cluster.Name}
	byName := make(map[string]*hallmarkv1.ClusterServer)
	if s.cluster.Member != nil {
		for _, p := range s.cluster.Member.Peers() {
			server := &hallmarkv1.ClusterServer{Name: p.Name, PeerAddress: p.Address, Role: hallmarkv1.ClusterServer_ROLE_FOLLOWER}
			switch {
			case p.Learner:
				server.Role = hallmarkv1.ClusterServer_ROLE_LEARNER
			case p.Leader:
				server.Role = hallmarkv1.ClusterServer_ROLE_LEADER
			}
			byName[p.Name] = server
			resp.Servers = append(resp.Servers, server)
		}
	}
	present, err := s.cluster.Store.Servers()
	if err != nil && s.cluster.Member == nil {
		return nil, status(err)
	}
	for _, p := range present {
		server := byName[p.Name]
		if server == nil && s.cluster.Member != nil {
			continue // it has just been removed
		}
		if server == nil {
			server = &hallmarkv1.ClusterServer{Name: p.Name}
			resp.Servers = append(resp.Servers, server)
		}
		server.Present, server.Address, server.Version = true, p.Address, p.Version
		server.Revision, server.Since, server.Leads = int64(p.Revision), p.Since.Unix(), p.Leads
	}
	slices.SortFunc(resp.Servers, func(a, b *hallmarkv1.ClusterServer) int {
		return strings.Compare(a.Name+" "+a.PeerAddress, b.Name+" "+b.PeerAddress)
	})
	return resp, nil
}

// Invite makes a secret with which one server may join.
func (s *clusterService) Invite(ctx context.Context, req *hallmarkv1.InviteRequest) (*hallmarkv1.InviteResponse, error) {
	if _, err := s.member(); err != nil {
		return nil, err
	}
	ttl := time.Duration(req.Ttl) * time.Second
	switch {
	case ttl == 0:
		ttl = cluster.DefaultInvitation
	case ttl < 0 || ttl > cluster.MaxInvitation:
		return nil, invalidArgument("ttl is %v; it is at most %v", ttl, cluster.MaxInvitation)
	}
	secret, expires, err := cluster.Invite(ctx, s.store, s.now(), ttl)
	if err != nil {
		return nil, clusterStatus(err)
	}
	return &hallmarkv1.InviteResponse{Secret: secret, ExpiresAt: expires.Unix()}, nil
}

// Join lets a new server in. Whoever shows the secret of an invitation is handed
// the key that makes members; he could not be told from a member afterwards.
func (s *clusterService) Join(ctx context.Context, req *hallmarkv1.JoinRequest) (*hallmarkv1.JoinResponse, error) {
	if err := s.limitAttesting(ctx); err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(req.PeerAddress)
	number, portErr := strconv.ParseUint(port, 10, 16)
	switch {
	case len(req.Name) == 0 || len(req.Name) > maxServerName || strings.ContainsAny(req.Name, "/=, \t\r\n"):
		return nil, invalidArgument("%q is no name of a server", clip(req.Name))
	case err != nil || portErr != nil || number == 0 || host == "" || len(req.PeerAddress) > maxPeerAddress || strings.ContainsAny(host, "/=,?#@ "):
		return nil, invalidArgument("%q is not the host:port of a server's member", clip(req.PeerAddress))
	}
	if s.cluster == nil || s.cluster.Member == nil {
		return nil, clusterStatus(cluster.ErrNotInvited) // what there is, is not a stranger's to know
	}
	admission, err := s.cluster.Member.Admit(ctx, s.store, req.Secret, req.Name, req.PeerAddress, s.now())
	if err != nil {
		return nil, clusterStatus(err)
	}
	s.log.Info("a server joins the cluster", "name", req.Name, "peer_address", req.PeerAddress)
	resp := &hallmarkv1.JoinResponse{CaCertificate: admission.CACertificate, CaKey: admission.CAKey}
	for _, p := range admission.Members {
		resp.Members = append(resp.Members, &hallmarkv1.ClusterMember{Name: p.Name, PeerAddress: p.Address})
	}
	return resp, nil
}

// RemoveServer takes a server out of the cluster.
func (s *clusterService) RemoveServer(ctx context.Context, req *hallmarkv1.RemoveServerRequest) (*hallmarkv1.RemoveServerResponse, error) {
	member, err := s.member()
	if err != nil {
		return nil, err
	}
	if err := member.Remove(ctx, req.Name); err != nil {
		return nil, clusterStatus(err)
	}
	s.log.Info("a server was removed from the cluster", "name", req.Name)
	return &hallmarkv1.RemoveServerResponse{}, nil
}

// clusterStatus is [status] for what may go wrong with a cluster.
func clusterStatus(err error) error {
	for known, code := range map[error]codes.Code{
		cluster.ErrNameTaken:          codes.AlreadyExists,
		cluster.ErrNotReady:           codes.Unavailable,
		cluster.ErrNoServer:           codes.NotFound,
		cluster.ErrLast:               codes.FailedPrecondition,
		cluster.ErrNotInvited:         codes.PermissionDenied,
		cluster.ErrTooManyInvitations: codes.ResourceExhausted,
	} {
		if errors.Is(err, known) {
			return &callError{code: code, text: known.Error(), cause: err}
		}
	}
	return status(err)
}
