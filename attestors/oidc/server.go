package oidc

import (
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
	"github.com/hallmark-id/hallmark/pkg/issuer"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// Issuers are those whose tokens make nodes. The audience of an issuer that
	// names none is the server's SPIFFE ID, spiffe://TRUST-DOMAIN/spire/server.
	// Required.
	Issuers []NodeIssuerConfig `yaml:"issuers"`
}

// NodeIssuerConfig is an issuer whose tokens make nodes.
type NodeIssuerConfig struct {
	IssuerConfig `yaml:",inline"`

	// FixedClaims are the claims that the issuer sets and that nobody else can
	// choose, and never gives to another later: names of projects or branches are
	// none. They alone may be in agent_path_template. Default: sub.
	FixedClaims []string `yaml:"fixed_claims"`
	// AgentPathTemplate makes the path of a node's SPIFFE ID after /spire/agent/.
	// It begins with oidc/NAME/ and holds .Claims.NAME of fixed claims; lower,
	// replace, trimPrefix, trimSuffix and sha256sum are functions. Default:
	// oidc/NAME/{{ sha256sum .Claims.sub }}, with the issuer's name.
	AgentPathTemplate string `yaml:"agent_path_template"`
	// Reattest has agents attest again with a new token, instead of renewing their
	// SVIDs: so a node whose token is no longer renewed ends. Default false.
	Reattest bool `yaml:"reattest"`
}

const (
	maxIssuers = 100     // more is a mistake in writing
	maxUses    = 200_000 // tokens that are remembered; about 150 bytes each
	verifyTime = 15 * time.Second
	logged     = 10 // failures that are logged before it is one a second
)

// Options of [New].
type Options struct {
	// Audience is what tokens are for, unless the issuer's configuration says
	// otherwise.
	Audience string
	Now      func() time.Time // nil is time.Now
	Log      *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	log     *slog.Logger
	now     func() time.Time
	issuers map[string]*nodeIssuer // by URL
	uses    *issuer.Uses
	loud    rate.Sometimes // that verification is not possible: any stranger can make it be tried
}

var _ attestors.Server = (*Server)(nil)

type nodeIssuer struct {
	*Issuer
	fixed    map[string]Claim
	path     *agentpath.Template
	reattest bool
}

// pathData is what a template knows.
type pathData struct{ Claims map[string]string }

// New makes the server's half. It fails if the configuration contradicts itself
// or if a file of it cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch n := len(c.Issuers); {
	case n == 0:
		return nil, errors.New("issuers is missing; name the issuers whose tokens make nodes")
	case n > maxIssuers:
		return nil, fmt.Errorf("issuers has %d; the most is %d", n, maxIssuers)
	}
	s := &Server{
		log: o.Log, now: o.Now, issuers: make(map[string]*nodeIssuer), uses: issuer.NewUses(maxUses),
		loud: rate.Sometimes{First: logged, Interval: time.Second},
	}
	names := make(map[string]bool)
	for _, one := range c.Issuers {
		made, err := newNodeIssuer(one, o)
		switch {
		case err != nil:
			return nil, fmt.Errorf("issuer %q: %w", attestors.Clip(one.Name), err)
		case names[one.Name]:
			return nil, fmt.Errorf("issuer %q is there twice", one.Name)
		case s.issuers[made.URL()] != nil:
			return nil, fmt.Errorf("issuer %q: %s is there already, under another name", one.Name, made.URL())
		}
		names[one.Name], s.issuers[made.URL()] = true, made
	}
	return s, nil
}

func newNodeIssuer(c NodeIssuerConfig, o Options) (*nodeIssuer, error) {
	made, err := NewIssuer(c.IssuerConfig, o.Audience, issuer.Options{Now: o.Now, Log: o.Log})
	if err != nil {
		return nil, err
	}
	n := &nodeIssuer{Issuer: made, fixed: make(map[string]Claim), reattest: c.Reattest}
	if len(c.FixedClaims) == 0 {
		c.FixedClaims = []string{"sub"}
	}
	one, two := pathData{make(map[string]string)}, pathData{make(map[string]string)}
	for _, name := range c.FixedClaims {
		if !claimName.MatchString(name) {
			return nil, fmt.Errorf("fixed_claims has %q; it is the name of a claim", attestors.Clip(name))
		}
		n.fixed[name] = Claim{path: []string{name}}
		one.Claims[name], two.Claims[name] = "one-"+name, "two-"+name
	}
	prefix := Name + "/" + c.Name
	template := c.AgentPathTemplate
	if template == "" {
		if !slices.Contains(c.FixedClaims, "sub") {
			return nil, errors.New("agent_path_template is missing; the default is made of sub, which is none of fixed_claims")
		}
		template = prefix + "/{{ sha256sum .Claims.sub }}"
	}
	if n.path, err = agentpath.Parse(prefix, template, one); err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	first, err := n.path.Path(one)
	if err != nil && strings.Contains(err.Error(), "map has no entry for key") {
		return nil, fmt.Errorf("agent_path_template: %w; only claims that fixed_claims lists may be in it", err)
	}
	if second, otherErr := n.path.Path(two); err == nil && otherErr == nil && first == second {
		return nil, errors.New("agent_path_template makes the same path of all tokens; put a fixed claim into it")
	}
	return n, nil
}

// Verify checks that the payload's token is of an issuer that is trusted, and
// names the node that it is of.
func (s *Server) Verify(ctx context.Context, data []byte, _ func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	p, err := parsePayload(data)
	if err != nil {
		return nil, err
	}
	url, err := issuer.Of(p.Token)
	if err != nil {
		return nil, err
	}
	i := s.issuers[url]
	if i == nil {
		return nil, fmt.Errorf("tokens of the issuer %q make no node here", attestors.Clip(url))
	}
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	token, selectors, err := i.Verify(ctx, p.Token)
	if err != nil {
		return nil, s.told(i, err)
	}
	of := pathData{make(map[string]string)}
	for name, claim := range i.fixed {
		values, err := claim.Values(token.Claims)
		if err != nil || len(values) != 1 {
			continue // of which the template may do without
		}
		of.Claims[name] = values[0]
	}
	path, err := i.path.Path(of)
	if err != nil {
		return nil, fmt.Errorf("the token makes no agent's name: %w", err)
	}
	if err := s.uses.Use(token, s.now()); err != nil {
		return nil, s.told(i, err)
	}
	return &attestors.Evidence{Path: path, Selectors: selectors, CanReattest: i.reattest}, nil
}

// told returns the error for the node, and logs what is none of its business.
func (s *Server) told(i *nodeIssuer, err error) error {
	if errors.Is(err, issuer.ErrUnavailable) || errors.Is(err, issuer.ErrBusy) {
		s.loud.Do(func() { s.log.Error("oidc cannot attest nodes now", "issuer", i.Name(), "error", err) })
		return attestors.ErrUnavailable
	}
	return err
}
