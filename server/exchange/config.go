package exchange

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/oidc"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/issuer"
)

// IssuerConfig is an issuer whose tokens may be exchanged for SVIDs. The parent
// ID of the entries for them is spiffe://TRUST-DOMAIN/hallmark/issuer/NAME.
type IssuerConfig struct {
	oidc.IssuerConfig `yaml:",inline"`

	// Preset knows the claims of an issuer of this kind, which become selectors
	// named for it, and what else of the configuration is always the same. Default:
	// none, which makes selectors oidc:… alone.
	Preset string `yaml:"preset" oneof:"github,gitlab,kubernetes,aws,gcp,azure,spiffe"`
	// TrustDomain is another trust domain whose JWT-SVIDs are the tokens. Its
	// bundle must be known here, by federation. Required with preset spiffe, and
	// for nothing else.
	TrustDomain string `yaml:"trust_domain" env:"expand"`

	// Reusable takes a token as often as it is shown until it ends: for issuers
	// that renew tokens seldom, such as Kubernetes. Default false.
	Reusable bool `yaml:"reusable"`
	// OutliveToken lets SVIDs last as long as their entries say, though the token
	// ends before. Default false.
	OutliveToken bool `yaml:"outlive_token"`
}

// preset is what is known of issuers of a kind.
type preset struct {
	issuer    string   // empty: each has another
	jwksHosts []string // besides the issuer's own
	maxAge    time.Duration
	claims    map[string]string // of selectors PRESET:NAME:VALUE
}

var presets = map[string]preset{
	// docs.github.com: OpenID Connect reference.
	"github": {
		issuer: "https://token.actions.githubusercontent.com",
		claims: same("repository_id", "repository", "repository_owner_id", "repository_owner", "repository_visibility", "enterprise_id",
			"ref", "ref_type", "ref_protected", "environment", "event_name", "workflow_ref", "workflow_sha", "job_workflow_ref",
			"job_workflow_sha", "sha", "actor_id", "runner_environment"),
	},
	// docs.gitlab.com: ID token payload.
	"gitlab": {
		issuer: "https://gitlab.com",
		claims: same("project_id", "project_path", "namespace_id", "namespace_path", "user_id", "pipeline_source", "ref", "ref_type",
			"ref_path", "ref_protected", "environment", "environment_protected", "deployment_tier", "ci_config_ref_uri", "ci_config_sha",
			"sha", "runner_id", "runner_environment"),
	},
	"kubernetes": {
		claims: map[string]string{
			"ns": "/kubernetes.io/namespace", "sa": "/kubernetes.io/serviceaccount/name", "sa_uid": "/kubernetes.io/serviceaccount/uid",
			"pod": "/kubernetes.io/pod/name", "pod_uid": "/kubernetes.io/pod/uid",
			"node": "/kubernetes.io/node/name", "node_uid": "/kubernetes.io/node/uid",
		},
	},
	// docs.aws.amazon.com: token claims of outbound identity federation.
	"aws": {
		claims: map[string]string{
			"arn": "sub", "account": "/https:~1~1sts.amazonaws.com~1/aws_account", "org_id": "/https:~1~1sts.amazonaws.com~1/org_id",
			"ou_path": "/https:~1~1sts.amazonaws.com~1/ou_path", "region": "/https:~1~1sts.amazonaws.com~1/source_region",
			"lambda_arn": "/https:~1~1sts.amazonaws.com~1/lambda_source_function_arn",
		},
	},
	"gcp": {
		issuer: "https://accounts.google.com", jwksHosts: []string{"www.googleapis.com"},
		claims: map[string]string{
			"account_id": "sub", "email": "email", "project_id": "/google/compute_engine/project_id", "project_number": "/google/compute_engine/project_number",
			"zone": "/google/compute_engine/zone", "instance_id": "/google/compute_engine/instance_id", "instance_name": "/google/compute_engine/instance_name",
		},
	},
	"azure": {
		jwksHosts: []string{"login.microsoftonline.com", "login.windows.net"}, maxAge: 24 * time.Hour, // tokens of managed identities last that long
		claims: map[string]string{"tenant_id": "tid", "object_id": "oid", "app_id": "appid", "resource_id": "xms_mirid", "type": "idtyp"},
	},
	"spiffe": {claims: map[string]string{"id": "sub"}},
}

func same(names ...string) map[string]string {
	out := make(map[string]string, len(names))
	for _, name := range names {
		out[name] = name
	}
	return out
}

// settled returns the configuration with what its preset says.
func (c IssuerConfig) settled(audience string) (IssuerConfig, error) {
	p := presets[c.Preset]
	c.Issuer = cmp.Or(c.Issuer, p.issuer)
	if c.MaxAge == 0 {
		c.MaxAge = config.Duration(p.maxAge)
	}
	if c.JWKSPath == "" && c.JWKSURL == "" {
		c.JWKSHosts = slices.Concat(c.JWKSHosts, p.jwksHosts)
	}
	if len(c.Audiences) == 0 {
		c.Audiences = []string{audience}
	}
	if (c.Preset == "spiffe") != (c.TrustDomain != "") {
		return c, errors.New("preset spiffe and trust_domain belong together; set both or none")
	}
	if c.TrustDomain != "" && (c.Issuer != "" || c.JWKSPath != "" || c.JWKSURL != "" || len(c.JWKSHosts) > 0 || len(c.Algorithms) > 0 || c.CAPath != "") {
		return c, errors.New("the keys of a trust domain are in its bundle; remove what says where others are")
	}
	return c, nil
}

// trusted is an issuer as the endpoint has it.
type trusted struct {
	*oidc.Issuer
	config IssuerConfig
	parent spiffeid.ID
	claims map[string]oidc.Claim // of the preset
}

// parentPath is the path of issuers' IDs.
const parentPath = "/hallmark/issuer/"

func newTrusted(c IssuerConfig, o *Options) (*trusted, error) {
	c, err := c.settled(o.Issuer)
	if err != nil {
		return nil, err
	}
	made := &trusted{config: c, claims: make(map[string]oidc.Claim)}
	of := issuer.Options{Now: o.Now, Log: o.Log}
	if c.TrustDomain != "" {
		td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
		switch {
		case err != nil || td.Name() != c.TrustDomain:
			return nil, fmt.Errorf("trust_domain %q is no name of a trust domain", attestors.Clip(c.TrustDomain))
		case td == o.TrustDomain:
			return nil, fmt.Errorf("trust_domain %q is this server's own", td.Name())
		}
		domain, err := issuer.NewTrustDomain(td, c.Config, o.bundleOf(td), of)
		if err != nil {
			return nil, err
		}
		made.Issuer, err = oidc.NewIssuerOf(c.IssuerConfig, domain)
		if err != nil {
			return nil, err
		}
	} else if made.Issuer, err = oidc.NewIssuer(c.IssuerConfig, o.Issuer, of); err != nil {
		return nil, err
	}
	if made.parent, err = spiffeid.FromPath(o.TrustDomain, parentPath+c.Name); err != nil {
		return nil, err
	}
	for name, path := range presets[c.Preset].claims {
		if made.claims[name], err = oidc.ParseClaim(path); err != nil {
			return nil, err
		}
	}
	return made, nil
}

// parseIssuer checks the URL by which the endpoint is known (RFC 8414 §2).
func parseIssuer(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" ||
		strings.HasSuffix(text, "#") || strings.HasSuffix(text, "/") || strings.Contains(u.Path, "//") || u.Path != (&url.URL{Path: u.Path}).EscapedPath() {
		return nil, fmt.Errorf("%q is not an https URL without query and fragment, such as https://tokens.example.org", attestors.Clip(text))
	}
	return u, nil
}
