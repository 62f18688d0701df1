package test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

// audience is whom the tokens of federated services are for.
const audience = "echo"

// federatedEcho accepts mTLS connections from one SPIFFE ID of a foreign trust
// domain, and says whose JWT-SVID it was sent.
func federatedEcho(peer, address string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	keys, err := workloadapi.NewJWTSource(ctx)
	if err != nil {
		return err
	}
	defer keys.Close()
	listener, err := tls.Listen("tcp", address, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(peer))))
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	fmt.Println("listening")
	for {
		conn, err := listener.Accept()
		if err != nil {
			return nil
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			token, err := bufio.NewReaderSize(conn, 8<<10).ReadString('\n')
			if err != nil {
				return
			}
			svid, err := jwtsvid.ParseAndValidate(strings.TrimSpace(token), keys, []string{audience})
			if err != nil {
				fmt.Fprintf(conn, "refused: %v\n", err)
				return
			}
			fmt.Fprintln(conn, svid.ID)
		}()
	}
}

// federatedCall calls such a service of a foreign trust domain again and again,
// over mTLS and with a JWT-SVID.
func federatedCall(peer, address string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	tokens, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer tokens.Close()
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(peer)))
	return keepCalling(ctx, source, 50*time.Millisecond, func() error {
		token, err := tokens.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
		if err != nil {
			return err
		}
		dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 20 * time.Second}, Config: config}
		conn, err := dialer.Dial("tcp", address)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(conn, token.Marshal()); err != nil {
			return err
		}
		answer, err := io.ReadAll(io.LimitReader(conn, 1<<10))
		if err == nil && string(answer) != token.ID.String()+"\n" {
			err = fmt.Errorf("the answer is %q", answer)
		}
		return err
	})
}

// side is one of two trust domains on hosts of their own.
type side struct {
	*harness.Domain
	name       string
	host       *harness.Host
	network    *harness.Network
	echo, call *harness.Process
}

const (
	sideEndpoint = "8443"
	sideEcho     = "9000"
)

func newSide(t *testing.T, host *harness.Host, name, settings string, env ...string) *side {
	t.Helper()
	s := &side{name: name, host: host, network: host.Network(t)}
	s.Domain = harness.NewDomain(t, harness.Settings{
		TrustDomain: name, ServerEnv: env, Network: s.network,
		Server: fmt.Sprintf("bundle_endpoint:\n  listen: %s\n%s", net.JoinHostPort(host.Address, sideEndpoint), settings),
	})
	s.StartServer(t)
	s.StartAgent(t, s.Join(t))
	return s
}

func (s *side) url() string { return "https://" + net.JoinHostPort(s.host.Address, sideEndpoint) }

// rotate replaces an authority, distrusts the old one once nobody needs it, and
// has the other side follow.
func (s *side) rotate(t *testing.T, kind string, other *side, follows func() error) {
	t.Helper()
	old := only(t, authorities(t, s.Domain, kind, "active")).ID
	s.Admin(t, "authority", "prepare", kind)
	other.Admin(t, "federation", "refresh", s.name)
	other.Admin(t, "node", "wait")
	s.Admin(t, "authority", "activate", kind)
	s.Admin(t, "authority", "taint", kind, old, "--yes")
	harness.Eventually(t, "services of "+s.name+" use its next "+kind+" authority", func(context.Context) error { return follows() })
	s.Admin(t, "node", "wait")
	s.Admin(t, "authority", "revoke", kind, old, "--yes")
	other.Admin(t, "federation", "refresh", s.name)
	other.Admin(t, "node", "wait")
}

// Two trust domains, each on a host of its own, with either profile. A service of
// each calls one of the other, over mTLS and by JWT at once, while both domains
// replace and revoke their authorities (twice with "make bridges"); no call fails.
func TestFederation_F02_F03_F05_F09_F10_F35_F38_F51_ServicesCallEachOtherWhileBothDomainsRotate(t *testing.T) {
	t.Parallel()
	lan := harness.NewLAN(t)
	hostA, hostB := lan.Host(t), lan.Host(t)
	web := harness.NewCertificate(t, hostB.Address)
	a := newSide(t, hostA, "a.example", "", "SSL_CERT_FILE="+web.Certificate) // https_spiffe
	b := newSide(t, hostB, "b.example", fmt.Sprintf("  https_web:\n    certificate: %s\n    key: %s\n", web.Certificate, web.Key))
	invitation := strings.TrimSpace(a.Admin(t, "federation", "invite", "--url", a.url()))
	b.Admin(t, "federation", "accept", "--yes", invitation)
	a.Admin(t, "federation", "create", b.name, "--url", b.url())
	harness.Eventually(t, "a fetches b's bundle by itself", func(context.Context) error {
		if list := a.Admin(t, "bundle", "list"); !strings.Contains(list, b.name) {
			return fmt.Errorf("the bundles are\n%s", list)
		}
		return nil
	})
	sides := []struct{ s, other *side }{{a, b}, {b, a}}
	for _, p := range sides {
		for path, uid := range map[string]int{"/echo": echoUID, "/caller": callerUID} {
			p.s.Entry(t, path, uid, "--federates-with", p.other.name)
		}
		p.s.echo = startServiceIn(t, p.s.network, echoUID, p.s.Socket, "TEST_SERVICE=federated-echo",
			"TEST_PEER=spiffe://"+p.other.name+"/caller", "TEST_ADDRESS="+net.JoinHostPort(p.s.host.Address, sideEcho))
		p.s.echo.WaitOutput(t, "listening")
	}
	for _, p := range sides {
		p.s.call = startServiceIn(t, p.s.network, callerUID, p.s.Socket, "TEST_SERVICE=federated-caller",
			"TEST_PEER=spiffe://"+p.other.name+"/echo", "TEST_ADDRESS="+net.JoinHostPort(p.other.host.Address, sideEcho))
		p.s.calls(t, "at first", 20)
	}
	rounds := 1
	if harness.IsLong() {
		rounds = 2
	}
	for round := range rounds {
		for _, p := range sides {
			p.s.rotate(t, "x509", p.other, func() error {
				if n := (&pair{caller: p.s.call}).seen(); n.Issuers != round+2 {
					return fmt.Errorf("so far %+v", n)
				}
				return nil
			})
			// A token is a minute old at most when its user has it replaced: what a
			// tainted authority signed, the agent gives out no more.
			p.s.rotate(t, "jwt", p.other, func() error { return p.s.calls(t, "with new tokens", 20) })
			p.s.calls(t, fmt.Sprintf("after %s has rotated (%d)", p.s.name, round+1), 20)
			p.other.calls(t, fmt.Sprintf("after %s has rotated (%d)", p.s.name, round+1), 20)
		}
	}

	// The endpoint is away: it is said, the last good bundle stays, and services go on.
	a.host.DropPort(t, sideEndpoint)
	if _, complaint, code := (harness.Command{Args: []string{"federation", "refresh", a.name, "--admin-socket", b.AdminSocket}, UID: harness.ServerUID}).Try(t); code == 0 {
		t.Error("a bundle was fetched through a wall")
	} else if shown := b.Admin(t, "federation", "show", a.name); !strings.Contains(shown, "Failing") || !strings.Contains(shown, "Fetched") {
		t.Errorf("after %q, the relationship is shown as\n%s", complaint, shown)
	}
	b.calls(t, "while an endpoint is away", 20)
	a.host.Heal(t)
	b.Admin(t, "federation", "refresh", a.name)
	if shown := b.Admin(t, "federation", "show", a.name); strings.Contains(shown, "Failing") {
		t.Errorf("once it is back, the relationship is shown as\n%s", shown)
	}
	for _, p := range sides {
		n := (&pair{caller: p.s.call}).seen()
		if n.Failures > 0 {
			t.Errorf("calls of %s that failed: %+v", p.s.name, n)
		}
		t.Logf("%s: %+v", p.s.name, n)
	}
}

// calls waits for so many more calls of the domain's service.
func (s *side) calls(t *testing.T, when string, more int) error {
	t.Helper()
	p := &pair{caller: s.call}
	from := p.seen().Requests
	p.waitFor(t, "calls of "+s.name+" "+when, func(n tally) bool { return n.Requests >= from+more })
	if n := p.seen(); n.Failures > 0 {
		return errors.New(strings.Join(n.Errors, "; "))
	}
	return nil
}
