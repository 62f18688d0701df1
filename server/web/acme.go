package web

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
)

// Bounds of what is done to have a certificate by ACME.
const (
	acmeAnswer = 30 * time.Second // one answer of the directory
	acmeTime   = 5 * time.Minute  // all of it
	acmeRetry  = 70 * time.Second // after a failure; autocert takes no other try within a minute
	acmeSlow   = time.Hour        // the same, once it has failed often
)

// ACMEOptions are what an [ACME] needs. Domains, Dir and Log are required.
type ACMEOptions struct {
	Domains   []string                     // that the endpoint has certificates for, lower case
	Directory string                       // URL; empty: Let's Encrypt's
	Roots     *x509.CertPool               // verify the directory; nil: the system's
	Email     string                       // whom the authority may write to; empty: nobody
	Account   *acme.ExternalAccountBinding // with the authority, that this one is bound to (RFC 8555 §7.3.4); nil: none
	Dir       string                       // where account and certificates are kept, for this user alone
	Log       *slog.Logger
}

// ACME is certificates that an authority issues by ACME (RFC 8555), to whom the
// endpoint itself proves that it is at its domains (tls-alpn-01, RFC 8737): the
// authority connects to port 443 of each, which has to lead to this listener.
// They are renewed when a third of their life is left.
type ACME struct {
	o       ACMEOptions
	manager *autocert.Manager
}

// NewACME makes one; [ACME.Obtain] has it obtain the certificates. Its use means
// that the authority's terms of service are accepted.
func NewACME(o ACMEOptions) *ACME {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{RootCAs: o.Roots, MinVersion: tls.VersionTLS12}
	return &ACME{o: o, manager: &autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		Cache:      autocert.DirCache(o.Dir),
		HostPolicy: autocert.HostWhitelist(o.Domains...),
		Email:      o.Email,

		ExternalAccountBinding: o.Account,
		Client: &acme.Client{
			DirectoryURL: o.Directory, UserAgent: "hallmark",
			HTTPClient: &http.Client{Transport: transport, Timeout: acmeAnswer},
		},
	}}
}

// Certificate returns that of the domain which a client asks for, or of the first
// if it names none; and to the authority, what proves that the endpoint is there.
func (a *ACME) Certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if slices.Contains(hello.SupportedProtos, acme.ALPNProto) {
		return a.manager.GetCertificate(hello)
	}
	name := hello.ServerName
	if name == "" {
		name = a.o.Domains[0]
	}
	return a.manager.GetCertificate(modern(name))
}

// modern asks for a certificate with an ECDSA key, whatever a client may have
// said: there is to be one certificate a domain.
func modern(name string) *tls.ClientHelloInfo {
	return &tls.ClientHelloInfo{
		ServerName:       name,
		CipherSuites:     []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
		SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
		SupportedCurves:  []tls.CurveID{tls.CurveP256},
	}
}

// Obtain obtains the certificates that there are none of, and tries until it has
// them or the context ends. The endpoint has to be served meanwhile.
func (a *ACME) Obtain(ctx context.Context) {
	missing := slices.Clone(a.o.Domains)
	for failures := 0; ; failures++ {
		missing = slices.DeleteFunc(missing, func(name string) bool {
			err := a.obtain(ctx, name)
			if err != nil && ctx.Err() == nil {
				a.o.Log.Error("no certificate can be had by ACME; will try again", "domain", name, "error", err)
			}
			return err == nil
		})
		if len(missing) == 0 {
			return
		}
		wait := time.NewTimer(min(acmeRetry<<min(failures, 10), acmeSlow))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return
		}
	}
}

func (a *ACME) obtain(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, acmeTime, errors.New("it took too long"))
	defer cancel()
	done := make(chan error, 1)
	go func() { // it ends when what it asks for is answered, or is given up
		cert, err := a.manager.GetCertificate(modern(name))
		if err == nil {
			a.o.Log.Info("an endpoint has a certificate by ACME", "domain", name, "expires_at", cert.Leaf.NotAfter)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("obtain a certificate of %s: %w", name, context.Cause(ctx))
	}
}
