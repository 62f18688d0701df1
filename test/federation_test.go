package test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

// partner is one of two trust domains that federate.
type partner struct {
	*harness.Domain
	name   string
	source *workloadapi.X509Source
}

// newPartner starts a trust domain that publishes its bundle, with a workload:
// this process.
func newPartner(t *testing.T, name, endpoint, settings string, env ...string) *partner {
	t.Helper()
	d := harness.NewDomain(t, harness.Settings{
		TrustDomain: name, ServerEnv: env, Server: fmt.Sprintf("bundle_endpoint:\n  listen: %s\n%s", endpoint, settings),
	})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	return &partner{Domain: d, name: name}
}

// register gives the workload an identity that federates, and follows it.
func (p *partner) register(t *testing.T, with *partner) {
	t.Helper()
	p.Admin(t, "entry", "create", "--spiffe-id", "/service", "--parent-id", "/node",
		"--selector", fmt.Sprint("unix:uid:", os.Getuid()), "--federates-with", with.name)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var err error
	p.source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+p.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.source.Close() })
}

// calls says whether the workload of one can call that of the other over mTLS.
func (p *partner) calls(other *partner) error {
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(other.source, other.source,
		tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://"+p.name+"/service"))))
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			err = c.(*tls.Conn).Handshake()
			c.Close()
		}
		served <- err
	}()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", l.Addr().String(),
		tlsconfig.MTLSClientConfig(p.source, p.source, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://"+other.name+"/service"))))
	if err != nil {
		return fmt.Errorf("%s calls %s: %w", p.name, other.name, err)
	}
	defer c.Close()
	return <-served
}

// Two trust domains, one of each profile: what each publishes reaches the
// workloads of the other, whatever is rotated, and whoever is away.
func TestFederation_F02_F05_F09_F10_F35_F38_TwoTrustDomains(t *testing.T) {
	t.Parallel()
	web := harness.NewCertificate(t, "127.0.0.1")
	endpointA, endpointB := harness.FreeAddress(t), harness.FreeAddress(t)
	a := newPartner(t, "a.example", endpointA, "", "SSL_CERT_FILE="+web.Certificate) // https_spiffe
	b := newPartner(t, "b.example", endpointB, fmt.Sprintf("  https_web:\n    certificate: %s\n    key: %s\n", web.Certificate, web.Key))

	// Of a, b has to have authorities first, which the invitation has; b's
	// endpoint is verified as a web site is.
	invitation := strings.TrimSpace(a.Admin(t, "federation", "invite", "--url", "https://"+endpointA))
	if shown := b.Admin(t, "federation", "accept", "--yes", invitation); !strings.Contains(shown, "spiffe://a.example/spire/server") {
		t.Errorf("accept shows\n%s", shown)
	}
	a.Admin(t, "federation", "create", b.name, "--url", "https://"+endpointB)
	harness.Eventually(t, "a fetches b's bundle by itself", func(context.Context) error {
		if list := a.Admin(t, "bundle", "list"); !strings.Contains(list, b.name) {
			return fmt.Errorf("the bundles are\n%s", list)
		}
		return nil
	})
	a.register(t, b)
	b.register(t, a)
	call := func(when string) {
		t.Helper()
		harness.Eventually(t, "calls "+when, func(context.Context) error {
			if err := a.calls(b); err != nil {
				return err
			}
			return b.calls(a)
		})
	}
	call("at first")

	for round := range 2 {
		for _, p := range []struct{ of, other *partner }{{a, b}, {b, a}} {
			old, err := p.of.source.GetX509SVID()
			if err != nil {
				t.Fatal(err)
			}
			leaked := only(t, authorities(t, p.of.Domain, "x509", "active"))
			p.of.Admin(t, "authority", "prepare", "x509")
			p.other.Admin(t, "federation", "refresh", p.of.name)
			p.of.Admin(t, "authority", "activate", "x509")
			p.of.Admin(t, "authority", "taint", "x509", leaked.ID, "--yes")
			harness.Eventually(t, "an SVID of the new authority", func(context.Context) error {
				now, err := p.of.source.GetX509SVID()
				if err == nil && string(now.Certificates[0].AuthorityKeyId) == string(old.Certificates[0].AuthorityKeyId) {
					err = fmt.Errorf("it is still of the old one")
				}
				return err
			})
			call(fmt.Sprintf("after %s changed its authority (%d)", p.of.name, round+1))
		}
	}

	// The endpoint goes away and comes back; the last good bundle stays.
	a.Server.Stop(t)
	if _, complaint, code := (harness.Command{Args: []string{"federation", "refresh", a.name, "--admin-socket", b.AdminSocket}, UID: harness.ServerUID}).Try(t); code == 0 || !strings.Contains(complaint, endpointA) {
		t.Errorf("the failure is not named: %d %s", code, complaint)
	}
	call("while an endpoint is away")
	a.StartServer(t)
	b.Admin(t, "federation", "refresh", a.name)
	call("after it came back")
}
