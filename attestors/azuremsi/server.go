package azuremsi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/agentpath"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/issuer"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// Tenants are those whose machines may attest. Required.
	Tenants []TenantConfig `yaml:"tenants"`
	// AgentPathTemplate makes the path of an agent's SPIFFE ID after
	// /spire/agent/: a Go text/template that must begin with azure_msi/. It has
	// .PluginName, .TenantID, .PrincipalID, .SubscriptionID, .ResourceGroup and
	// .VMName; besides Go's own functions lower, replace, trimPrefix, trimSuffix and
	// sha256sum. Default: {{ .PluginName }}/{{ .TenantID }}/{{ .PrincipalID }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
	// AllowReattestation lets a machine attest that has an agent already. Every
	// process that can ask its metadata service can then become its agent. Default:
	// a machine attests once, until its agent is evicted.
	AllowReattestation bool `yaml:"allow_reattestation"`
}

// TenantConfig is a tenant whose machines may attest.
type TenantConfig struct {
	// TenantID is the tenant's, a GUID. Required.
	TenantID string `yaml:"tenant_id"`
	// SubscriptionAllowList are the IDs of the subscriptions whose machines may
	// attest. Required.
	SubscriptionAllowList []string `yaml:"subscription_allow_list"`
	// ResourceID is what tokens must be for. Whoever gets a token for the default
	// can use it at Azure, as far as the machine's identity may, and a server of
	// another trust domain with the same one can show it here: register an
	// application of your own and name its URI, such as api://hallmark. Default:
	// https://management.azure.com/.
	ResourceID string `yaml:"resource_id" env:"expand"`
	// MaxAge is how long after it was made a token is good, at most 30d. The
	// metadata service keeps one for most of a day. Default 24h.
	MaxAge config.Duration `yaml:"max_age"`

	// JWKSURL is where Entra's keys are. Default:
	// https://login.microsoftonline.com/TENANT/discovery/v2.0/keys.
	JWKSURL string `yaml:"jwks_url" env:"expand"`
	// JWKSPath is a file of Entra's keys, with which nothing is fetched: they change
	// every few weeks. Read for each attestation. Default: none.
	JWKSPath string `yaml:"jwks_path" env:"expand"`
	// CAPath is a PEM file of the authorities that the certificate of jwks_url must
	// lead to. Read at the start. Default: those of the operating system.
	CAPath string `yaml:"ca_path" env:"expand"`
}

const (
	defaultTemplate = "{{ .PluginName }}/{{ .TenantID }}/{{ .PrincipalID }}"
	defaultMaxAge   = 24 * time.Hour
	maxListed       = 1000 // of each list; more is a mistake in writing
	// verifyTime is how long the verification of a token may take, all that is
	// fetched included.
	verifyTime = 15 * time.Second
	// logged is how many failures are logged before it is one a second.
	logged = 10
)

// pathData is what a template is executed with.
type pathData struct {
	PluginName, TenantID, PrincipalID, SubscriptionID, ResourceGroup, VMName string
}

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	o        Options
	tenants  map[string]*tenant // by what their tokens have as iss
	reattest bool
	template *agentpath.Template
	loud     rate.Sometimes // that verification is not possible
}

var _ attestors.Server = (*Server)(nil)

// tenant is one whose machines may attest.
type tenant struct {
	id            string
	subscriptions []string
	entra         *issuer.Issuer
}

// New makes the server's half. It fails if the configuration contradicts itself, or
// if a file of it cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, tenants: make(map[string]*tenant), reattest: c.AllowReattestation, loud: rate.Sometimes{First: logged, Interval: time.Second}}
	switch n := len(c.Tenants); {
	case n == 0:
		return nil, errors.New("tenants is missing; name the tenants whose machines may attest, as anybody can have one of their own")
	case n > maxListed:
		return nil, fmt.Errorf("tenants has %d items; the most is %d", n, maxListed)
	}
	for _, t := range c.Tenants {
		if err := s.add(t); err != nil {
			return nil, fmt.Errorf("tenant %q: %w", attestors.Clip(t.TenantID), err)
		}
	}
	const word = "sample"
	var err error
	s.template, err = agentpath.Parse(Name, cmp.Or(c.AgentPathTemplate, defaultTemplate), pathData{Name, word, word, word, word, word})
	if err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return s, nil
}

func (s *Server) add(c TenantConfig) error {
	id := strings.ToLower(c.TenantID)
	if !guidForm.MatchString(id) {
		return errors.New("tenant_id is no GUID")
	}
	switch n := len(c.SubscriptionAllowList); {
	case n == 0:
		return errors.New("subscription_allow_list is missing; name the subscriptions whose machines may attest")
	case n > maxListed:
		return fmt.Errorf("subscription_allow_list has %d items; the most is %d", n, maxListed)
	}
	var subscriptions []string
	for _, subscription := range c.SubscriptionAllowList {
		subscription = strings.ToLower(subscription)
		if !guidForm.MatchString(subscription) {
			return fmt.Errorf("subscription_allow_list has %q, which is no GUID", attestors.Clip(subscription))
		}
		subscriptions = append(subscriptions, subscription)
	}
	if c.JWKSURL == "" && c.JWKSPath == "" {
		c.JWKSURL = "https://login.microsoftonline.com/" + id + "/discovery/v2.0/keys"
	}
	// Which of its two names Entra has for itself depends on the resource.
	for _, iss := range []string{"https://sts.windows.net/" + id + "/", "https://login.microsoftonline.com/" + id + "/v2.0"} {
		if s.tenants[iss] != nil {
			return errors.New("it is there twice")
		}
		entra, err := issuer.New(issuer.Config{
			Issuer: iss, Audiences: []string{cmp.Or(c.ResourceID, DefaultResource)}, Algorithms: []string{"RS256"},
			MaxAge: cmp.Or(c.MaxAge, config.Duration(defaultMaxAge)), JWKSURL: c.JWKSURL, JWKSPath: c.JWKSPath, CAPath: c.CAPath,
		}, issuer.Options{Now: s.o.Now, Log: s.o.Log})
		if err != nil {
			return err
		}
		s.tenants[iss] = &tenant{id, subscriptions, entra}
	}
	return nil
}

// Verify checks that Entra has signed the token, for this server, of a machine that
// may attest.
func (s *Server) Verify(ctx context.Context, data []byte, _ func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	e, err := s.verify(ctx, data)
	if errors.Is(err, issuer.ErrUnavailable) {
		if ctx.Err() == nil { // the node still waits
			s.loud.Do(func() { s.o.Log.Error("azure_msi cannot attest nodes now", "error", err) })
		}
		return nil, attestors.ErrUnavailable
	}
	return e, err
}

func (s *Server) verify(ctx context.Context, data []byte) (*attestors.Evidence, error) {
	p, err := parsePayload(data)
	if err != nil {
		return nil, err
	}
	iss, err := issuer.Of(p.Token)
	if err != nil {
		return nil, err
	}
	of := s.tenants[iss]
	if of == nil {
		return nil, fmt.Errorf("token is of the issuer %q; machines of that tenant may not attest here", attestors.Clip(iss))
	}
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	token, err := of.entra.Validate(ctx, p.Token)
	if err != nil {
		return nil, fmt.Errorf("managed identity token: %w", err)
	}
	m, err := parseMachine(token.Claims)
	if err != nil {
		return nil, err
	}
	switch {
	case m.Tenant != of.id:
		return nil, fmt.Errorf("token is of the tenant %s, but its issuer is that of %s", m.Tenant, of.id)
	case !slices.Contains(of.subscriptions, m.Subscription):
		return nil, fmt.Errorf("machines of the subscription %s may not attest here", m.Subscription)
	}
	path, err := s.template.Path(pathData{Name, m.Tenant, m.Principal, m.Subscription, m.Group, m.VMName})
	if err != nil {
		return nil, fmt.Errorf("machine does not fit the agent_path_template: %w", err)
	}
	return &attestors.Evidence{
		Path:        path,
		Selectors:   attestors.SelectorsOf(Name, []string{"subscription-id:" + m.Subscription, "vm-name:" + m.Group + ":" + m.VMName}),
		CanReattest: s.reattest,
		Once:        !s.reattest,
	}, nil
}
