package azureimds

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/agentpath"
	"github.com/hallmark-id/hallmark/attestors/cms"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// Tenants are those whose machines may attest. Required.
	Tenants []TenantConfig `yaml:"tenants"`
	// MetadataDomains are the domains of the certificates that documents are
	// signed by. Default: metadata.azure.com; that of the US government's cloud is
	// metadata.azure.us.
	MetadataDomains []string `yaml:"metadata_domains"`
	// CABundlePath is a PEM file of the authorities that those certificates must
	// lead to, at most 4 MiB, read for each attestation. Default: DigiCert Global
	// Root CA and G2, and Microsoft TLS RSA Root G2.
	CABundlePath string `yaml:"ca_bundle_path" env:"expand"`
	// CAIssuerHosts are the hosts, or host:port, of which certificates between
	// those may be fetched, by plain HTTP: they are not believed for where they
	// come from. Default: www.microsoft.com and caissuers.microsoft.com.
	CAIssuerHosts []string `yaml:"ca_issuer_hosts"`
	// AllowReattestation lets a machine attest that has an agent already. Every
	// process that can ask its metadata service can then become its agent.
	// Default: a machine attests once, until its agent is evicted.
	AllowReattestation bool `yaml:"allow_reattestation"`
	// AgentPathTemplate makes the path of an agent's SPIFFE ID after
	// /spire/agent/: a Go text/template that must begin with azure_imds/. It has
	// .PluginName, .TenantID, .SubscriptionID and .VMID; besides Go's own functions
	// lower, replace, trimPrefix, trimSuffix and sha256sum. Default: {{
	// .PluginName }}/{{ .TenantID }}/{{ .SubscriptionID }}/{{ .VMID }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
}

// TenantConfig is a tenant whose machines may attest.
type TenantConfig struct {
	// TenantID is the tenant's ID, a GUID. It is a part of agents' SPIFFE IDs.
	// Required.
	TenantID string `yaml:"tenant_id" env:"expand"`
	// SubscriptionAllowList are the tenant's subscriptions, GUIDs, whose machines
	// may attest. Required.
	SubscriptionAllowList []string `yaml:"subscription_allow_list"`
	// Describe asks the Azure Resource Graph about each machine of the tenant that
	// attests. Default: nothing is asked, and subscription-id is the only selector.
	Describe *DescribeConfig `yaml:"describe"`
}

const (
	defaultTemplate = "{{ .PluginName }}/{{ .TenantID }}/{{ .SubscriptionID }}/{{ .VMID }}"
	maxListed       = 1000        // of each list; more is a mistake in writing
	skew            = time.Minute // by which clocks may differ

	// verifyTime is how long the verification of a document may take, all that is
	// fetched included.
	verifyTime = 15 * time.Second
	// maxRunning is how many machines are asked about at once: an API that is slow
	// is not asked ever more.
	maxRunning = 32
	// logged is how many failures are logged before it is one a second.
	logged = 10
)

var (
	defaultDomains = []string{"metadata.azure.com"}
	defaultIssuers = []string{"www.microsoft.com", "caissuers.microsoft.com"}
)

// pathData is what a template is executed with.
type pathData struct{ PluginName, TenantID, SubscriptionID, VMID string }

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	c        ServerConfig
	o        Options
	tenants  map[string]*tenant // by subscription
	chains   *chains
	template *agentpath.Template
	running  *semaphore.Weighted
	loud     rate.Sometimes // that verification is not possible
}

var _ attestors.Server = (*Server)(nil)

type tenant struct {
	id    string
	graph *graph // nil: not asked
}

// unavailable is why a document cannot be verified, which is not the node's fault
// and none of its business.
type unavailable struct{ error }

// New makes the server's half. It fails if the configuration contradicts itself,
// or if the authorities cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if len(c.MetadataDomains) == 0 {
		c.MetadataDomains = defaultDomains
	}
	if len(c.CAIssuerHosts) == 0 {
		c.CAIssuerHosts = defaultIssuers
	}
	s := &Server{
		c: c, o: o, tenants: make(map[string]*tenant),
		running: semaphore.NewWeighted(maxRunning), loud: rate.Sometimes{First: logged, Interval: time.Second},
	}
	for name, n := range map[string]int{"tenants": len(c.Tenants), "metadata_domains": len(c.MetadataDomains), "ca_issuer_hosts": len(c.CAIssuerHosts)} {
		if n > maxListed {
			return nil, fmt.Errorf("%s has %d items; the most is %d", name, n, maxListed)
		}
	}
	if len(c.Tenants) == 0 {
		return nil, errors.New("tenants is missing; name those whose machines may attest, as anybody can have one of their own")
	}
	for _, domain := range c.MetadataDomains {
		if !strings.Contains(strings.Trim(domain, "."), ".") || strings.Trim(domain, ".") != domain {
			return nil, fmt.Errorf("metadata_domains has %q; write a domain like metadata.azure.com", domain)
		}
	}
	for _, one := range c.Tenants {
		if err := s.addTenant(one); err != nil {
			return nil, err
		}
	}
	var err error
	if s.chains, err = newChains(c); err != nil {
		return nil, err
	}
	text := c.AgentPathTemplate
	if text == "" {
		text = defaultTemplate
	}
	const word = "sample"
	if s.template, err = agentpath.Parse(Name, text, pathData{Name, word, word, word}); err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return s, nil
}

func (s *Server) addTenant(c TenantConfig) error {
	id := strings.ToLower(c.TenantID)
	if !guidForm.MatchString(id) {
		return fmt.Errorf("tenants: tenant_id is %q; write the tenant's ID, a GUID", c.TenantID)
	}
	switch n := len(c.SubscriptionAllowList); {
	case n == 0:
		return fmt.Errorf("tenant %s: subscription_allow_list is missing; name the subscriptions whose machines may attest", id)
	case n > maxListed:
		return fmt.Errorf("tenant %s: subscription_allow_list has %d items; the most is %d", id, n, maxListed)
	}
	t := &tenant{id: id}
	if c.Describe != nil {
		var err error
		if t.graph, err = newGraph(id, *c.Describe, s.o.Now); err != nil {
			return fmt.Errorf("tenant %s: describe: %w", id, err)
		}
	}
	for _, subscription := range c.SubscriptionAllowList {
		subscription = strings.ToLower(subscription)
		if !guidForm.MatchString(subscription) {
			return fmt.Errorf("tenant %s: subscription_allow_list has %q; write a subscription's ID, a GUID", id, subscription)
		}
		if s.tenants[subscription] != nil {
			return fmt.Errorf("tenant %s: subscription %s is there twice; it belongs to one tenant", id, subscription)
		}
		s.tenants[subscription] = t
	}
	return nil
}

// Verify has the node show a document over a nonce, and checks that Azure has
// signed it, of a machine that may attest.
func (s *Server) Verify(ctx context.Context, payload []byte, challenge func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	if len(payload) > maxResponse {
		return nil, fmt.Errorf("azure_imds payload is %d bytes long; the most is %d", len(payload), maxResponse)
	}
	nonce := newNonce()
	answer, err := challenge(ctx, []byte(nonce))
	if err != nil {
		return nil, err
	}
	e, err := s.verify(ctx, answer, nonce)
	if cause := (unavailable{}); errors.As(err, &cause) {
		if ctx.Err() == nil { // the node still waits
			s.loud.Do(func() { s.o.Log.Error("azure_imds cannot attest nodes now", "error", cause.error) })
		}
		return nil, attestors.ErrUnavailable
	}
	return e, err
}

// newNonce makes one of 190 bits, in the letters and digits that IMDS takes.
func newNonce() string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	out := make([]byte, 0, nonceSize)
	for buf := make([]byte, nonceSize); len(out) < nonceSize; {
		rand.Read(buf) // never fails
		for _, b := range buf {
			if b < 4*byte(len(alphabet)) && len(out) < nonceSize { // all are as likely
				out = append(out, alphabet[int(b)%len(alphabet)])
			}
		}
	}
	return string(out)
}

func (s *Server) verify(ctx context.Context, answer []byte, nonce string) (*attestors.Evidence, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	r, err := parseResponse(answer)
	if err != nil {
		return nil, err
	}
	message, err := cms.Parse(r.Document.Signature)
	if err != nil {
		return nil, err
	}
	// All that costs nothing comes before anything is fetched. The certificate, and
	// so the document, is believed only after the last of these checks.
	signer := message.Signer()
	if signer == nil {
		return nil, errors.New("the document does not bring the certificate that it is signed by")
	}
	if err := s.checkNames(signer); err != nil {
		return nil, err
	}
	signed, err := message.Verify(signer, s.o.Now())
	if err != nil {
		return nil, err
	}
	d, err := parseDocument(signed)
	if err != nil {
		return nil, err
	}
	now := s.o.Now()
	switch {
	case subtle.ConstantTimeCompare([]byte(d.Nonce), []byte(nonce)) != 1:
		return nil, errors.New("the document is over another nonce than this server's; the metadata service may keep one for a while: try again")
	case now.After(d.TimeStamp.ExpiresOn.Add(skew)):
		return nil, errors.New("the document has expired")
	case now.Add(skew).Before(d.TimeStamp.CreatedOn.Time):
		return nil, errors.New("the document is not yet made; compare the clocks")
	}
	t := s.tenants[d.SubscriptionID]
	if t == nil {
		return nil, fmt.Errorf("machines of the subscription %s may not attest here", d.SubscriptionID)
	}
	if err := s.running.Acquire(ctx, 1); err != nil {
		return nil, unavailable{fmt.Errorf("%d earlier attestations are not finished", maxRunning)}
	}
	defer s.running.Release(1)
	if err := s.chains.verify(ctx, signer, message.Certificates(), now); err != nil {
		return nil, err
	}

	values := []string{"subscription-id:" + d.SubscriptionID}
	if t.graph != nil {
		m, err := t.graph.describe(ctx, d)
		if err != nil {
			return nil, err
		}
		values = append(values, m.selectors(t.graph.c.AllowedVMTags)...)
	}
	path, err := s.template.Path(pathData{Name, t.id, d.SubscriptionID, d.VMID})
	if err != nil {
		return nil, fmt.Errorf("machine does not fit the agent_path_template: %w", err)
	}
	return &attestors.Evidence{
		Path:        path,
		Selectors:   attestors.SelectorsOf(Name, values),
		CanReattest: s.c.AllowReattestation,
		Once:        !s.c.AllowReattestation,
	}, nil
}

// checkNames checks that a certificate is of a metadata service of Azure: its
// authorities sign for the whole Web.
func (s *Server) checkNames(cert *x509.Certificate) error {
	for _, name := range cert.DNSNames {
		name = strings.ToLower(name)
		for _, domain := range s.c.MetadataDomains {
			if name == domain || strings.HasSuffix(name, "."+domain) {
				return nil
			}
		}
	}
	return fmt.Errorf("the document is signed by a certificate of %q, which is none of Azure's metadata services", attestors.Clip(strings.Join(cert.DNSNames, " ")))
}
