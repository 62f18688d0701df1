package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/join"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// Bounds of invitations.
const (
	DefaultInvitation = 10 * time.Minute
	MaxInvitation     = 24 * time.Hour
	maxInvitations    = 20 // that are open at once

	invitationPrefix = "invitation/" // <SHA-256 of the secret>
)

// ErrTooManyInvitations: so many are open already.
var ErrTooManyInvitations = fmt.Errorf("there are %d open invitations already; use one, or wait until they have expired", maxInvitations)

// ErrNotInvited: the secret is that of no open invitation. Which of the reasons
// it is, a stranger does not learn.
var ErrNotInvited = errors.New(`the invitation is not known, was used, or has expired; make a new one with "hallmark cluster invite"`)

// Invite makes a secret with which one server may join until a time. Of it, only
// a hash is kept.
func Invite(ctx context.Context, s store.Store, now time.Time, ttl time.Duration) (secret string, expires time.Time, err error) {
	expires = now.Add(ttl).Truncate(time.Second)
	value, err := proto.Marshal(&hallmarkv1.Invitation{ExpiresAt: expires.Unix()})
	if err != nil {
		return "", expires, err
	}
	open, ended := 0, []store.Txn{}
	_, err = s.Read(ctx, invitationPrefix, func(r store.Record) error {
		if expired(r, now) {
			ended = append(ended, take(r))
		} else {
			open++
		}
		return nil
	})
	if err != nil {
		return "", expires, err
	}
	if open >= maxInvitations {
		return "", expires, ErrTooManyInvitations
	}
	secret = rand.Text()
	made := store.Txn{Do: []store.Write{{Key: invitationKey(secret), Value: value}}}
	return secret, expires, s.Commit(ctx, append(ended, made)...)[len(ended)].Err
}

func invitationKey(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return invitationPrefix + hex.EncodeToString(sum[:])
}

// expired also holds for what cannot be read.
func expired(r store.Record, now time.Time) bool {
	var i hallmarkv1.Invitation
	return proto.Unmarshal(r.Value, &i) != nil || !now.Before(time.Unix(i.ExpiresAt, 0))
}

func take(r store.Record) store.Txn {
	return store.Txn{If: []store.Condition{{Key: r.Key, Revision: r.Revision}}, Do: []store.Write{{Key: r.Key}}}
}

// invited returns the open invitation of a secret.
func invited(ctx context.Context, s store.Store, secret string, now time.Time) (store.Record, error) {
	var found *store.Record
	if _, err := s.Read(ctx, invitationKey(secret), func(r store.Record) error {
		found = &r
		return nil
	}); err != nil {
		return store.Record{}, err
	}
	if found == nil || expired(*found, now) {
		return store.Record{}, ErrNotInvited
	}
	return *found, nil
}

// redeem uses up an invitation.
func redeem(ctx context.Context, s store.Store, invitation store.Record) error {
	err := s.Commit(ctx, take(invitation))[0].Err
	if errors.Is(err, store.ErrConflict) { // another server was quicker
		return ErrNotInvited
	}
	return err
}

// Admit lets a server in that shows an invitation. It begins as a learner, which
// has no vote: a server that does not come does not cost the majority.
func (m *Member) Admit(ctx context.Context, s store.Store, secret, name, at string, now time.Time) (*Admission, error) {
	invitation, err := invited(ctx, s, secret, now)
	if err != nil { // first: a stranger does not learn which names there are
		return nil, err
	}
	if slices.ContainsFunc(m.Peers(), func(p Peer) bool { return p.Name == name }) {
		return nil, ErrNameTaken
	}
	if err := redeem(ctx, s, invitation); err != nil {
		return nil, err
	}
	u := peerURL(at)
	var added *clientv3.MemberAddResponse
	err = m.change(ctx, func(ctx context.Context, c *clientv3.Client) (err error) {
		added, err = c.MemberAddAsLearner(ctx, []string{u.String()})
		return err
	})
	if err != nil {
		return nil, err
	}
	a := &Admission{CACertificate: m.ca.cert.Raw}
	if a.CAKey, err = x509.MarshalPKCS8PrivateKey(m.ca.key); err != nil {
		return nil, err
	}
	for _, p := range added.Members {
		peer := Peer{ID: p.ID, Name: p.Name, Address: address(p.PeerURLs)}
		if p.ID == added.Member.ID { // it says its name when it starts
			peer.Name = name
		}
		a.Members = append(a.Members, peer)
	}
	return a, nil
}

// joinTime bounds what a new server waits for one that is there.
const joinTime = 30 * time.Second

// Join has a server that is there make this one a member, and keeps what Start
// needs. On a server that has joined before, or has a member already, it does
// nothing.
func Join(ctx context.Context, o Options, invitation *join.String) error {
	for _, path := range []string{o.membersFile(), o.dataDir()} {
		if _, err := os.Stat(path); err == nil {
			o.Log.Info("this server has a member of a cluster already; the invitation is not used", "dir", o.Dir)
			return nil
		}
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	resp, err := ask(ctx, o, invitation)
	if err != nil {
		return fmt.Errorf("join the cluster at %s: %w", invitation.Server, err)
	}
	key, err := x509.ParsePKCS8PrivateKey(resp.CaKey)
	if err != nil {
		return fmt.Errorf("join the cluster: %w", err)
	}
	authority, err := parseCA(resp.CaCertificate, key)
	if err != nil {
		return fmt.Errorf("join the cluster: %w", err)
	}
	var members []string
	for _, p := range resp.Members {
		u := peerURL(p.PeerAddress)
		members = append(members, p.Name+"="+u.String())
	}
	if err := o.saveCA(authority); err != nil {
		return err
	}
	return writeFile(o.membersFile(), []byte(strings.Join(members, ","))) // last: it says that all is there
}

// ask finds out the roots that the invitation pins, and then shows the secret to
// a server that they vouch for, and to no other.
func ask(ctx context.Context, o Options, invitation *join.String) (*hallmarkv1.JoinResponse, error) {
	roots, err := pinnedRoots(ctx, invitation)
	if err != nil {
		return nil, err
	}
	server := spiffeid.RequireFromPath(invitation.TrustDomain, entry.ServerPath)
	known := tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(server))
	known.MinVersion = tls.VersionTLS13
	conn, err := grpc.NewClient("passthrough:"+invitation.Server, grpc.WithTransportCredentials(credentials.NewTLS(known)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := hallmarkv1.NewClusterServiceClient(conn).Join(ctx, &hallmarkv1.JoinRequest{
		Secret: invitation.Token, Name: o.Name, PeerAddress: o.Advertise,
	}, grpc.WaitForReady(true))
	if err != nil {
		return nil, errors.New(grpcstatus.Convert(err).Message())
	}
	return resp, nil
}

// pinnedRoots gets the bundle of the trust domain from whoever answers, and
// keeps of it what the invitation pins by hash.
func pinnedRoots(ctx context.Context, invitation *join.String) (*x509bundle.Bundle, error) {
	// Nothing is believed but what the hashes say.
	anyone := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	conn, err := grpc.NewClient("passthrough:"+invitation.Server, grpc.WithTransportCredentials(credentials.NewTLS(anyone)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	b, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		if grpcstatus.Code(err) == codes.DeadlineExceeded || grpcstatus.Code(err) == codes.Unavailable {
			return nil, fmt.Errorf("no server answers there: %s", grpcstatus.Convert(err).Message())
		}
		return nil, err
	}
	roots := x509bundle.New(invitation.TrustDomain)
	for _, a := range b.X509Authorities {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err == nil && cert.IsCA && invitation.Pins(cert) {
			roots.AddX509Authority(cert)
		}
	}
	if roots.Empty() {
		return nil, errors.New(`none of its roots is pinned in the invitation; either another server answers at this address, or its authorities were replaced since: make a new one with "hallmark cluster invite"`)
	}
	return roots, nil
}
