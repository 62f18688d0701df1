package api_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/attestors/jointoken"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/registry"
)

// authorityCalls are SPIRE's calls for one kind of authority.
type authorityCalls struct {
	state             func() (active, prepared, old *localauthorityv1.AuthorityState)
	prepare           func() (*localauthorityv1.AuthorityState, error)
	activate          func(id string) (*localauthorityv1.AuthorityState, error)
	taint, revoke     func(id string) (*localauthorityv1.AuthorityState, error)
	tainted, verifier func(b *types.Bundle, id string) bool // in the bundle: marked; there at all
}

func (w *world) authorityCalls() map[string]authorityCalls {
	c, ctx := w.authorities(), w.t.Context()
	find := func(b *types.Bundle, id string) (there, tainted bool) {
		for _, k := range b.JwtAuthorities {
			if k.KeyId == id {
				return true, k.Tainted
			}
		}
		for _, x := range b.X509Authorities {
			if keyID(w.t, x.Asn1) == id {
				return true, x.Tainted
			}
		}
		return false, false
	}
	isThere := func(b *types.Bundle, id string) bool { there, _ := find(b, id); return there }
	isTainted := func(b *types.Bundle, id string) bool { _, tainted := find(b, id); return tainted }
	return map[string]authorityCalls{
		"x509": {
			state: func() (active, prepared, old *localauthorityv1.AuthorityState) {
				r, err := c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
				must(w.t, err)
				return r.Active, r.Prepared, r.Old
			},
			prepare: func() (*localauthorityv1.AuthorityState, error) {
				r, err := c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
				return r.GetPreparedAuthority(), err
			},
			activate: func(id string) (*localauthorityv1.AuthorityState, error) {
				r, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
				return r.GetActivatedAuthority(), err
			},
			taint: func(id string) (*localauthorityv1.AuthorityState, error) {
				r, err := c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
				return r.GetTaintedAuthority(), err
			},
			revoke: func(id string) (*localauthorityv1.AuthorityState, error) {
				r, err := c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id})
				return r.GetRevokedAuthority(), err
			},
			tainted: isTainted, verifier: isThere,
		},
		"jwt": {
			state: func() (active, prepared, old *localauthorityv1.AuthorityState) {
				r, err := c.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
				must(w.t, err)
				return r.Active, r.Prepared, r.Old
			},
			prepare: func() (*localauthorityv1.AuthorityState, error) {
				r, err := c.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
				return r.GetPreparedAuthority(), err
			},
			activate: func(id string) (*localauthorityv1.AuthorityState, error) {
				r, err := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: id})
				return r.GetActivatedAuthority(), err
			},
			taint: func(id string) (*localauthorityv1.AuthorityState, error) {
				r, err := c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id})
				return r.GetTaintedAuthority(), err
			},
			revoke: func(id string) (*localauthorityv1.AuthorityState, error) {
				r, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: id})
				return r.GetRevokedAuthority(), err
			},
			tainted: isTainted, verifier: isThere,
		},
	}
}

func keyID(t testing.TB, der []byte) string {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return hex.EncodeToString(cert.SubjectKeyId)
}

func (c authorityCalls) rotate(w *world) (old string) {
	w.t.Helper()
	next, err := c.prepare()
	must(w.t, err)
	_, err = c.activate(next.AuthorityId)
	must(w.t, err)
	_, _, former := c.state()
	return former.AuthorityId
}

func (w *world) bundle() *types.Bundle {
	w.t.Helper()
	b, err := bundlev1.NewBundleClient(w.admin()).GetBundle(w.t.Context(), &bundlev1.GetBundleRequest{})
	must(w.t, err)
	return b
}

func TestAnAuthorityGoesThroughItsStates(t *testing.T) {
	w := newWorld(t)
	for kind, c := range w.authorityCalls() {
		t.Run(kind, func(t *testing.T) {
			first, prepared, old := c.state()
			if first == nil || prepared != nil || old != nil {
				t.Fatalf("at first: active %v, prepared %v, old %v", first, prepared, old)
			}
			for name, call := range map[string]func(string) (*localauthorityv1.AuthorityState, error){"activate": c.activate, "taint": c.taint, "revoke": c.revoke} {
				_, err := call("")
				expectCode(t, err, codes.InvalidArgument, "no authority ID provided")
				if name != "activate" {
					_, err = call("none")
					expectCode(t, err, codes.InvalidArgument, "unexpected authority ID")
					_, err = call(first.AuthorityId)
					expectCode(t, err, codes.FailedPrecondition, "unable to "+name+" "+kind+" authority "+first.AuthorityId+": it is the one that signs")
				}
			}
			next, err := c.prepare()
			must(t, err)
			if _, p, _ := c.state(); p.GetAuthorityId() != next.AuthorityId || next.ExpiresAt == 0 {
				t.Errorf("prepared %v, the state has %v", next, p)
			}
			_, err = c.taint(next.AuthorityId)
			expectCode(t, err, codes.FailedPrecondition, "it is prepared")
			got, err := c.activate(next.AuthorityId)
			must(t, err)
			active, prepared, old := c.state()
			if got.AuthorityId != next.AuthorityId || active.AuthorityId != next.AuthorityId || prepared != nil || old.AuthorityId != first.AuthorityId {
				t.Errorf("after activation: %v; active %v, prepared %v, old %v", got, active, prepared, old)
			}
			_, err = c.revoke(first.AuthorityId)
			expectCode(t, err, codes.FailedPrecondition, "it is not tainted; taint it first")

			sequence := w.bundle().SequenceNumber
			got, err = c.taint(first.AuthorityId)
			must(t, err)
			b := w.bundle()
			if got.AuthorityId != first.AuthorityId || got.ExpiresAt != first.ExpiresAt || !c.tainted(b, first.AuthorityId) || c.tainted(b, next.AuthorityId) || b.SequenceNumber != sequence+1 {
				t.Errorf("after the taint of %v: %v, bundle %d", got, b, b.SequenceNumber)
			}
			got, err = c.revoke(first.AuthorityId)
			must(t, err)
			b = w.bundle()
			if got.AuthorityId != first.AuthorityId || c.verifier(b, first.AuthorityId) || !c.verifier(b, next.AuthorityId) || b.SequenceNumber != sequence+2 {
				t.Errorf("after the revocation of %v: %v, bundle %d", got, b, b.SequenceNumber)
			}
			active, prepared, old = c.state()
			if active.AuthorityId != next.AuthorityId || prepared != nil || old != nil {
				t.Errorf("at last: active %v, prepared %v, old %v", active, prepared, old)
			}
			for _, method := range []string{"Taint", "Revoke"} {
				if len(w.log.lines("audit", method, first.AuthorityId, "outcome=OK")) != 1 {
					t.Errorf("%s: no record of who did it", method)
				}
			}
		})
	}
}

func TestWhatIsAboveOrBesideThisServersAuthoritiesIsNotOffered(t *testing.T) {
	c, ctx := newWorld(t).authorities(), t.Context()
	_, err := c.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "ab"})
	expectCode(t, err, codes.FailedPrecondition, "no upstream authority")
	_, err = c.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "ab"})
	expectCode(t, err, codes.FailedPrecondition, "no upstream authority")
	_, err = c.GetWITAuthorityState(ctx, &localauthorityv1.GetWITAuthorityStateRequest{})
	expectCode(t, err, codes.Unimplemented, "WIT")
	_, err = c.PrepareWITAuthority(ctx, &localauthorityv1.PrepareWITAuthorityRequest{})
	expectCode(t, err, codes.Unimplemented, "WIT")
	_, err = c.ActivateWITAuthority(ctx, &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: "ab"})
	expectCode(t, err, codes.Unimplemented, "WIT")
	_, err = c.TaintWITAuthority(ctx, &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: "ab"})
	expectCode(t, err, codes.Unimplemented, "WIT")
	_, err = c.RevokeWITAuthority(ctx, &localauthorityv1.RevokeWITAuthorityRequest{AuthorityId: "ab"})
	expectCode(t, err, codes.Unimplemented, "WIT")
}

func TestAnAgentOfATaintedAuthorityWorksAndRenewsAndOfARevokedOneIsToldWhyNot(t *testing.T) {
	w := newWorld(t)
	ca := w.authorityCalls()["x509"]
	renewing, idle, silent := w.newAgent(), w.newAgent(), w.newAgent()
	check := func(s *svid) error {
		_, err := entryv1.NewEntryClient(w.connect(s)).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		return err
	}
	open := w.follow(idle)
	silentConn := w.connect(silent) // and its connection, opened before
	_, err := entryv1.NewEntryClient(silentConn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	must(t, err)

	old := ca.rotate(w)
	open.next(w)
	if len(w.registry.View().Bundle(td).X509Authorities) == 2 {
		_, err = ca.taint(old)
		must(t, err)
	}
	must(t, check(renewing))
	must(t, check(idle))
	renewed := w.renew(renewing)
	if got := hex.EncodeToString(renewed.leaf().AuthorityKeyId); got == old {
		t.Fatal("renewed by the tainted authority")
	}
	must(t, check(renewed))
	w.create(idle, "/secret")
	m := open.next(w)
	for len(m.Entries) == 0 {
		m = open.next(w)
	}

	_, err = ca.revoke(old)
	must(t, err)
	must(t, check(renewed))
	// An open stream tells the bundle, then the reason; a connection that was
	// there before is worth no more than a new one.
	m, err = open.stream.Recv()
	must(t, err)
	if len(m.Bundles) != 1 || len(m.Bundles[0].X509Authorities) != 1 || len(m.Entries) != 0 {
		t.Errorf("the last message is %v", m)
	}
	_, err = open.stream.Recv()
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	expectReason(t, check(idle), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	_, err = entryv1.NewEntryClient(silentConn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	expectCode(t, err, codes.PermissionDenied, "does not verify")
	_, err = agentv1.NewAgentClient(w.connect(idle)).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, newKey(t))}})
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)

	// It may attest again, on that same connection.
	key := newKey(t)
	res, err := attest(t.Context(), silentConn, jointoken.Name, w.token(), newCSR(t, key))
	must(t, err)
	must(t, check(newSVID(t, res.Svid, key)))
}

func TestTheServersOwnSVIDIsNeverOfATaintedAuthority(t *testing.T) {
	w := newWorld(t)
	ca := w.authorityCalls()["x509"]
	signedBy := func() string {
		t.Helper()
		c, err := tls.Dial("tcp", w.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		must(t, err)
		defer c.Close()
		return hex.EncodeToString(c.ConnectionState().PeerCertificates[0].AuthorityKeyId)
	}
	first := signedBy()
	old := ca.rotate(w)
	if first != old {
		t.Fatalf("at first %s signed it, and %s is active", first, old)
	}
	_, err := ca.taint(old)
	must(t, err)
	active, _, _ := ca.state()
	if got := signedBy(); got != active.AuthorityId {
		t.Errorf("after the taint it is signed by %s, and %s is active", got, active.AuthorityId)
	}
}

func TestAJoinStringDoesNotPinATaintedAuthority(t *testing.T) {
	w := newWorld(t)
	ca := w.authorityCalls()["x509"]
	roots := func() int {
		t.Helper()
		info, err := w.adminService().GetJoinInfo(t.Context(), &hallmarkv1.GetJoinInfoRequest{})
		must(t, err)
		return len(info.RootHashes)
	}
	old := ca.rotate(w)
	if n := roots(); n != 2 {
		t.Errorf("it pins %d roots while none is tainted, want 2", n)
	}
	_, err := ca.taint(old)
	must(t, err)
	if n := roots(); n != 1 {
		t.Errorf("it pins %d roots after the taint, want 1", n)
	}
}

func TestWhatARevokedJWTAuthoritySignedVerifiesNoMore_T25(t *testing.T) {
	w := newWorld(t)
	jwt := w.authorityCalls()["jwt"]
	minted, err := svidv1.NewSVIDClient(w.admin()).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: wireID(id("/a")), Audience: []string{"x"}})
	must(t, err)
	verifies := func() bool {
		b := jwtbundle.New(td)
		for _, k := range w.registry.View().Bundle(td).JWTAuthorities {
			must(t, b.AddJWTAuthority(k.KeyID, k.PublicKey))
		}
		_, err := jwtsvid.ParseAndValidate(minted.Svid.Token, b, []string{"x"})
		return err == nil
	}
	old := jwt.rotate(w)
	_, err = jwt.taint(old)
	must(t, err)
	if !verifies() {
		t.Error("it does not verify although its authority is only tainted")
	}
	_, err = jwt.revoke(old)
	must(t, err)
	if verifies() {
		t.Error("it verifies although its authority is revoked")
	}
}

func TestAnAdminWhoseAuthorityIsRevokedIsDenied(t *testing.T) {
	w := newWorld(t)
	ca := w.authorityCalls()["x509"]
	agent := w.newAgent()
	boss := w.workload(agent, "/boss", func(e *types.Entry) { e.Admin = true })
	remote := localauthorityv1.NewLocalAuthorityClient(w.connect(boss))
	_, err := remote.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	must(t, err)
	old := ca.rotate(w)
	_, err = remote.TaintX509Authority(t.Context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: old})
	must(t, err) // an admin may, and does it to itself
	_, err = remote.RevokeX509Authority(t.Context(), &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: old})
	must(t, err)
	_, err = remote.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	expectCode(t, err, codes.PermissionDenied, "does not verify")
}

func TestAnOperatorLearnsWhoDependsOnAnAuthority(t *testing.T) {
	w := newWorld(t)
	ca := w.authorityCalls()["x509"]
	use := func(id string) *hallmarkv1.AuthorityUse {
		t.Helper()
		resp, err := w.adminService().ListAuthorities(t.Context(), &hallmarkv1.ListAuthoritiesRequest{})
		must(t, err)
		i := slices.IndexFunc(resp.Authorities, func(a *hallmarkv1.Authority) bool { return a.Id == id })
		if i < 0 || len(resp.Uses) != len(resp.Authorities) {
			t.Fatalf("%d authorities, %d uses, %s at %d", len(resp.Authorities), len(resp.Uses), id, i)
		}
		return resp.Uses[i]
	}
	connected, other, banned, expired := w.newAgent(), w.newAgent(), w.newAgent(), w.newAgent()
	w.follow(connected)
	change := func(s *svid, change func(n *registry.Node)) {
		_, err := w.registry.UpdateNode(t.Context(), s.id, func(n *registry.Node) error { change(n); return nil })
		must(t, err)
	}
	change(other, func(n *registry.Node) { n.CanReattest = true })
	change(banned, func(n *registry.Node) { n.Banned = true })
	change(expired, func(n *registry.Node) { n.ExpiresAt = time.Now().Add(-time.Hour) })
	active, _, _ := ca.state()
	got := use(active.AuthorityId)
	if got.Agents != 2 || got.ConnectedAgents != 1 || got.LostAgents != 1 {
		t.Errorf("at first: %v; want 2 agents, 1 connected, 1 lost", got)
	}
	if got.Signed < 4 || got.LastExpiresAt < time.Now().Add(50*time.Minute).Unix() || got.LastExpiresAt > time.Now().Add(2*time.Hour).Unix() {
		t.Errorf("it signed %d, the last until %v", got.Signed, time.Unix(got.LastExpiresAt, 0))
	}

	old := ca.rotate(w)
	renewed := w.renew(connected)
	if got := use(old); got.Agents != 1 || got.ConnectedAgents != 0 || got.LostAgents != 0 {
		t.Errorf("after one has renewed: %v; want the other alone", got)
	}
	_, err := entryv1.NewEntryClient(w.connect(renewed)).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	must(t, err)
	active, _, _ = ca.state()
	if got := use(active.AuthorityId); got.Agents != 1 {
		t.Errorf("of the new one: %v; want 1 agent", got)
	}
}
