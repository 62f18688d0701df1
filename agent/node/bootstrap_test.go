package node_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// impostor is a server with keys of its own that answers in place of the real
// one.
func impostor(t *testing.T, w *world) *nodetest.Server {
	t.Helper()
	fake := nodetest.New(t)
	fake.Tokens[token] = true
	w.options.Dial = fake.Dial
	return fake
}

// refuses expects the node to end, and the impostor not to have seen the token.
func refuses(t *testing.T, w *world, fake *nodetest.Server, parts ...string) {
	t.Helper()
	r := w.run(t)
	wantError(t, r.ended(t), append(parts, "not to be trusted")...)
	if len(fake.Seen) != 0 {
		t.Errorf("the token went to an impostor: %q", fake.Seen)
	}
	if s := r.Status(); !s.ID.IsZero() {
		t.Errorf("node took the identity %s", s.ID)
	}
}

func TestJoinRefusesAServerWithOtherRoots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		refuses(t, w, impostor(t, w), "none of its roots is pinned", "hallmark token generate")
	})
}

func TestJoinRefusesAnImpostorThatShowsTheRealBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		fake := impostor(t, w)
		fake.Bundle = w.APIBundle()
		refuses(t, w, fake, "signed by unknown authority")
	})
}

func TestJoinRefusesAnImpostorThatAddsItsRootToTheRealBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		fake := impostor(t, w)
		mixed := w.APIBundle()
		mixed.X509Authorities = append(mixed.X509Authorities, fake.APIBundle().X509Authorities...)
		fake.Bundle = mixed
		refuses(t, w, fake, "signed by unknown authority")
	})
}

func TestJoinRefusesAWorkloadThatPosesAsTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.ServerID = spiffeid.RequireFromPath(nodetest.TrustDomain, "/web")
		refuses(t, w, w.Server, `that of "spiffe://example.org/web"`)
	})
}

func TestJoinRefusesAServerOfAnotherTrustDomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.ServerID = spiffeid.RequireFromString("spiffe://other.org/spire/server")
		refuses(t, w, w.Server, "other.org")
	})
}

// What was verified of a connection must not be taken for another one.
func TestJoinSendsTheTokenOnlyOnTheVerifiedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		fake := nodetest.New(t)
		fake.Tokens[token] = true
		fake.Bundle = w.APIBundle()

		// The attacker lets the first connection through to the real server,
		// cuts it when the bundle was fetched, and answers every later one.
		var dials atomic.Int32
		var first net.Conn
		w.options.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			if dials.Add(1) > 1 {
				return fake.Dial(ctx, address)
			}
			c, err := w.Dial(ctx, address)
			first = c
			return c, err
		}
		w.Before = func(_ context.Context, method string) error {
			if strings.HasSuffix(method, "AttestAgent") {
				first.Close()
			}
			return nil
		}
		r := w.run(t)
		err := r.ended(t)
		wantError(t, err, "not to be trusted")
		if len(fake.Seen) != 0 {
			t.Errorf("the token went to an impostor: %q", fake.Seen)
		}
		if dials.Load() < 2 || w.CallCount("AttestAgent") != 1 {
			t.Errorf("the attack did not take place: %d dials, %d attestations", dials.Load(), w.CallCount("AttestAgent"))
		}
	})
}

func TestJoinTakesOverTheWholeBundleOfTheVerifiedServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		old := w.Authorities[0]
		w.Rotate() // not pinned; signs the node's SVID
		w.ServerSigner = old
		r := w.run(t)
		r.connected(t)
	})
}

func TestJoinTellsThatItsRootsWereReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Rotate() // not pinned; signs the server's certificate as well
		refuses(t, w, w.Server, "signed by unknown authority")
	})
}

func TestATrustBundleVouchesForTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Tokens[token] = true
		w.options.TrustBundle = w.CurrentBundle()
		w.options.Attestor = joinToken(t, token)
		w.run(t).connected(t)
	})
}

func TestATrustBundleDoesNotVouchForAnImpostor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.TrustBundle = w.CurrentBundle()
		w.options.Attestor = joinToken(t, token)
		fake := impostor(t, w)
		fake.Bundle = w.APIBundle()
		refuses(t, w, fake, "signed by unknown authority")
		if fake.CallCount("GetBundle") != 0 {
			t.Error("the node called an untrusted server")
		}
	})
}

func TestInsecureBootstrapTrustsWhoAnswersAndWarns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Tokens[token] = true
		w.AgentTTL = 5 * time.Minute
		w.options.Insecure = true
		w.options.Attestor = joinToken(t, token)
		r := w.run(t)
		r.connected(t)
		if log := w.log.String(); !strings.Contains(log, "level=WARN") || !strings.Contains(log, "INSECURE") {
			t.Errorf("no warning: %s", log)
		}
		r.stop()

		// From now on the server is known, and an impostor is not.
		w.log.b.Reset()
		fake := impostor(t, w)
		again := w.run(t)
		time.Sleep(10 * time.Minute) // beyond the end of the SVID, too
		if s := again.Status(); s.Connected {
			t.Error("connected to an impostor")
		}
		if len(fake.Seen) != 0 || strings.Contains(w.log.String(), "INSECURE") {
			t.Errorf("fell back to insecure bootstrap (%q): %s", fake.Seen, w.log.String())
		}
	})
}

func TestInsecureBootstrapWantsAServerThatFitsItsOwnBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Tokens[token] = true
		w.options.Insecure = true
		w.options.Attestor = joinToken(t, token)
		w.Bundle = nodetest.New(t).APIBundle()
		refuses(t, w, w.Server, "by its own bundle")
	})
}

func TestWithoutAnyTrustTheAgentDoesNotStart(t *testing.T) {
	w := newWorld(t)
	w.options.Attestor = joinToken(t, token)
	_, err := node.Open(w.options)
	wantError(t, err, "no reason to trust the server", "hallmark token generate")
}

// SPIFFE federation §5.2.2.4 (F-35), within the trust domain: connections are
// verified with the latest bundle, not with that of the bootstrap.
func TestConnections_F35_AreVerifiedWithTheLatestBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		for range 2 {
			w.Rotate()
			if err := r.SetBundle(w.CurrentBundle()); err != nil {
				t.Fatal(err)
			}
			// The server's certificate is by the new authority; the old ones
			// are gone once the node has renewed.
			time.Sleep(40 * time.Minute)
			w.Lock()
			w.Authorities = w.Authorities[len(w.Authorities)-1:]
			w.Unlock()
			if err := r.SetBundle(w.CurrentBundle()); err != nil {
				t.Fatal(err)
			}
			l := r.connected(t)
			w.Stop()
			w.Start()
			<-l.Done()
			r.connected(t)
		}
		r.stop()
		w.run(t).connected(t) // the bundle is on disk, too
	})
}

func TestAServerWhoseAuthorityWasDroppedIsNotTrustedAnyMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		l := r.connected(t)
		stale := w.Authorities[0]
		w.Rotate()
		w.Authorities = w.Authorities[1:]
		if err := r.SetBundle(w.CurrentBundle()); err != nil {
			t.Fatal(err)
		}
		w.ServerSigner = stale
		w.Stop()
		w.Start()
		<-l.Done()
		time.Sleep(time.Minute)
		s := r.Status()
		if s.Connected {
			t.Error("connected to a server of a dropped authority")
		}
		wantError(t, s.LastError, "not trusted")
	})
}

// In TLS 1.3 the client's handshake is done before the server looks at its
// certificate.
func TestAConnectionIsNotUsedBeforeTheServerHasTakenTheCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		l := r.connected(t)
		w.Lock()
		server := w.Authorities[0]
		w.Authorities = []*nodetest.Authority{nodetest.NewAuthority(t)}
		w.ServerSigner = server
		w.RequireClient = true
		w.Unlock()
		w.Stop()
		w.Start()
		<-l.Done()
		time.Sleep(time.Minute)
		if s := r.Status(); s.Connected {
			t.Error("connected to a server that refuses the certificate")
		}
		wantError(t, r.Status().LastError, "connect to server")
		if strings.Count(w.log.String(), `msg="connected to the server"`) != 1 {
			t.Errorf("a refused connection was used: %s", w.log)
		}
	})
}

func TestABundleFromTheServerIsBoundedAndChecked(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*types.Bundle)
		want   string
	}{
		"another trust domain": {func(b *types.Bundle) { b.TrustDomain = "other.org" }, `of trust domain "other.org"`},
		"no authority":         {func(b *types.Bundle) { b.X509Authorities = nil }, "0 X.509 authorities"},
		"too many": {func(b *types.Bundle) {
			for range 100 {
				b.X509Authorities = append(b.X509Authorities, b.X509Authorities[0])
			}
		}, "more than 100"},
		"too large":     {func(b *types.Bundle) { b.X509Authorities[0].Asn1 = make([]byte, 2<<20) }, "larger than max"},
		"malformed":     {func(b *types.Bundle) { b.X509Authorities[0].Asn1 = []byte("x") }, "X.509 authority 1"},
		"malformed key": {func(b *types.Bundle) { b.JwtAuthorities = []*types.JWTKey{{PublicKey: []byte("x")}} }, "JWT authority 1"},
		"nothing": {func(b *types.Bundle) {
			b.X509Authorities = []*types.X509Certificate{nil}
			b.JwtAuthorities = []*types.JWTKey{nil}
		}, "X.509 authority 1"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := joining(t)
				w.Bundle = w.APIBundle()
				c.change(w.Bundle)
				r := w.run(t)
				time.Sleep(time.Second)
				wantError(t, r.Status().LastError, c.want)
				if len(w.Seen) != 0 {
					t.Error("the token was sent")
				}
			})
		})
	}
}

func pemOf(b *bundle.Bundle) []byte {
	var out []byte
	for _, a := range b.X509Authorities {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Raw})...)
	}
	return out
}

// SPIFFE federation §5.2.2.2 (F-31): the bootstrap bundle may be in SPIFFE's
// format, or PEM.
func TestParseTrustBundle_F31_ReadsBothFormats(t *testing.T) {
	s := nodetest.New(t)
	s.Rotate()
	want := s.CurrentBundle()
	spiffe, err := spiffebundle.FromX509Authorities(nodetest.TrustDomain, []*x509.Certificate{
		want.X509Authorities[0].Certificate, want.X509Authorities[1].Certificate,
	}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"PEM": pemOf(want), "SPIFFE": spiffe} {
		got, err := node.ParseTrustBundle(nodetest.TrustDomain, data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(got.X509Authorities) != 2 || !got.HasX509(want.X509Authorities[1].Certificate) {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

func TestParseTrustBundleSaysWhatIsWrong(t *testing.T) {
	s := nodetest.New(t)
	good := pemOf(s.CurrentBundle())
	leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Chain(nil, "/web")[0]})
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})
	for want, data := range map[string][]byte{
		"0 X.509 authorities":              {},
		"neither PEM":                      []byte("hello"),
		"neither":                          append(append([]byte{}, good...), "rubbish"...),
		`type "PRIVATE KEY"`:               append(append([]byte{}, good...), key...),
		"not that of an authority":         leaf,
		"certificate 1":                    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}),
		"trust bundle: spiffebundle":       []byte("{"),
		"trust bundle is larger than 1048": make([]byte, 1<<20+1),
	} {
		_, err := node.ParseTrustBundle(nodetest.TrustDomain, data)
		wantError(t, err, want)
	}
}

func FuzzParseTrustBundle(f *testing.F) {
	s := nodetest.New(f)
	f.Add(pemOf(s.CurrentBundle()))
	f.Add([]byte(`{"keys":[{"use":"x509-svid","kty":"EC","x5c":["AA=="]}],"spiffe_sequence":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := node.ParseTrustBundle(nodetest.TrustDomain, data)
		if err == nil && (len(b.X509Authorities) == 0 || b.TrustDomain != nodetest.TrustDomain) {
			t.Errorf("accepted %v", b)
		}
	})
}
