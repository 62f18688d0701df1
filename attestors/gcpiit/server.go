package gcpiit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/agentpath"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/issuer"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// ProjectIDAllowList are the IDs of the projects whose instances may attest.
	// Required.
	ProjectIDAllowList []string `yaml:"projectid_allow_list"`
	// Audience is what tokens must be for. A server of another trust domain with
	// the same one can show here what it was shown: give each its own, if all
	// agents are of this program. Default: spire-gcp-node-attestor.
	Audience string `yaml:"audience" env:"expand"`
	// MaxAge is how long after it was made a token is good, at most 1h. The
	// metadata server may keep one for some time. Default 1h.
	MaxAge config.Duration `yaml:"max_age"`
	// AllowReattestation lets an instance attest that has an agent already. Every
	// process that can ask its metadata server can then become its agent. Default:
	// an instance attests once, until its agent is evicted.
	AllowReattestation bool `yaml:"allow_reattestation"`

	// JWKSURL is where Google's keys are. Default:
	// https://www.googleapis.com/oauth2/v3/certs.
	JWKSURL string `yaml:"jwks_url" env:"expand"`
	// JWKSPath is a file of Google's keys, with which nothing is fetched: they
	// change every few days. Read for each attestation. Default: none.
	JWKSPath string `yaml:"jwks_path" env:"expand"`
	// CAPath is a PEM file of the authorities that the certificate of jwks_url must
	// lead to. Read at the start. Default: those of the operating system.
	CAPath string `yaml:"ca_path" env:"expand"`

	// UseInstanceMetadata asks the Compute Engine API about each instance that
	// attests. Without it there are no selectors tag, label and metadata, and a
	// token of an instance that is gone is good until it ends. Default false.
	UseInstanceMetadata bool `yaml:"use_instance_metadata"`
	// ServiceAccountFile is the file of a service account's key that the API is
	// asked with: it may call compute.instances.get. Default: the one that the
	// environment's GOOGLE_APPLICATION_CREDENTIALS names, or else the service
	// account of the instance that the server is on.
	ServiceAccountFile string `yaml:"service_account_file" env:"expand"`
	// AllowedLabelKeys are the labels of instances that become selectors. Default:
	// none.
	AllowedLabelKeys []string `yaml:"allowed_label_keys"`
	// AllowedMetadataKeys are the metadata of instances that become selectors.
	// Default: none.
	AllowedMetadataKeys []string `yaml:"allowed_metadata_keys"`
	// MaxMetadataValueSize is the most bytes that the value of one of
	// allowed_metadata_keys has; an instance that has more is refused. Default 128.
	MaxMetadataValueSize int `yaml:"max_metadata_value_size"`
	// Endpoint is the URL of the Compute Engine API: HTTPS, or HTTP on this
	// machine. Default https://compute.googleapis.com.
	Endpoint string `yaml:"endpoint" env:"expand"`
	// MetadataAddress is the URL of the metadata server that has the server's own
	// tokens, without a path. Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`

	// AgentPathTemplate makes the path of an agent's SPIFFE ID after
	// /spire/agent/: a Go text/template that must begin with gcp_iit/. It has
	// .PluginName, .ProjectID, .ProjectNumber, .Zone, .InstanceID, .InstanceName,
	// .InstanceCreationTimestamp and .ServiceAccount, with _ for its @; besides Go's
	// own functions lower, replace, trimPrefix, trimSuffix and sha256sum. Default:
	// {{ .PluginName }}/{{ .ProjectID }}/{{ .InstanceID }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
}

const (
	googleIssuer    = "https://accounts.google.com"
	googleKeys      = "https://www.googleapis.com/oauth2/v3/certs"
	defaultTemplate = "{{ .PluginName }}/{{ .ProjectID }}/{{ .InstanceID }}"
	defaultMaxValue = 128
	maxListed       = 1000 // of each list; more is a mistake in writing
	longestAge      = time.Hour

	// verifyTime is how long the verification of a token may take, all that is
	// fetched included.
	verifyTime = 15 * time.Second
	// maxRunning is how many instances are asked about at once: an API that is
	// slow is not asked ever more.
	maxRunning = 32
	// logged is how many failures are logged before it is one a second.
	logged = 10
)

// pathData is what a template is executed with.
type pathData struct {
	PluginName, ProjectID, ProjectNumber, Zone, InstanceID, InstanceName, InstanceCreationTimestamp, ServiceAccount string
}

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	c        ServerConfig
	o        Options
	google   *issuer.Issuer
	compute  *compute // nil: not asked
	template *agentpath.Template
	running  *semaphore.Weighted
	loud     rate.Sometimes // that verification is not possible
}

var _ attestors.Server = (*Server)(nil)

// unavailable is why a token cannot be verified, which is not the node's fault and
// none of its business.
type unavailable struct{ error }

// New makes the server's half. It fails if the configuration contradicts itself, or
// if a file of it cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c.Audience = cmp.Or(c.Audience, DefaultAudience)
	c.MaxMetadataValueSize = cmp.Or(c.MaxMetadataValueSize, defaultMaxValue)
	s := &Server{
		c: c, o: o,
		running: semaphore.NewWeighted(maxRunning), loud: rate.Sometimes{First: logged, Interval: time.Second},
	}
	for name, n := range map[string]int{
		"projectid_allow_list": len(c.ProjectIDAllowList), "allowed_label_keys": len(c.AllowedLabelKeys), "allowed_metadata_keys": len(c.AllowedMetadataKeys),
	} {
		if n > maxListed {
			return nil, fmt.Errorf("%s has %d items; the most is %d", name, n, maxListed)
		}
	}
	if len(c.ProjectIDAllowList) == 0 {
		return nil, errors.New("projectid_allow_list is missing; name the projects whose instances may attest, as anybody can have one of their own")
	}
	for _, project := range c.ProjectIDAllowList {
		if !projectForm.MatchString(project) {
			return nil, fmt.Errorf("projectid_allow_list has %q; write a project's ID, like big-kahuna-123456", project)
		}
	}
	switch {
	case c.MaxAge < 0 || time.Duration(c.MaxAge) > longestAge:
		return nil, fmt.Errorf("max_age is %v; it is between 1s and 1h", time.Duration(c.MaxAge))
	case c.MaxMetadataValueSize < 0:
		return nil, fmt.Errorf("max_metadata_value_size is %d; it cannot be negative", c.MaxMetadataValueSize)
	case !c.UseInstanceMetadata && (c.ServiceAccountFile != "" || len(c.AllowedLabelKeys) > 0 || len(c.AllowedMetadataKeys) > 0 || c.Endpoint != ""):
		return nil, errors.New("service_account_file, allowed_label_keys, allowed_metadata_keys and endpoint are about the Compute Engine API; set use_instance_metadata, or remove them")
	}
	keys := issuer.Config{
		Issuer: googleIssuer, Audiences: []string{c.Audience}, Algorithms: []string{"RS256"}, MaxAge: c.MaxAge,
		JWKSURL: c.JWKSURL, JWKSPath: c.JWKSPath, CAPath: c.CAPath,
	}
	if keys.JWKSURL == "" && keys.JWKSPath == "" {
		keys.JWKSURL = googleKeys
	}
	var err error
	if s.google, err = issuer.New(keys, issuer.Options{Now: o.Now, Log: o.Log}); err != nil {
		return nil, err
	}
	if c.UseInstanceMetadata {
		if s.compute, err = newCompute(c, o.Now); err != nil {
			return nil, err
		}
	}
	text := cmp.Or(c.AgentPathTemplate, defaultTemplate)
	const word = "sample"
	s.template, err = agentpath.Parse(Name, text, pathData{Name, word, word, word, word, word, word, word})
	if err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return s, nil
}

// Verify checks that Google has signed the token, for this server, of an instance
// that may attest.
func (s *Server) Verify(ctx context.Context, payload []byte, _ func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	e, err := s.verify(ctx, payload)
	cause := unavailable{}
	if errors.As(err, &cause) || errors.Is(err, issuer.ErrUnavailable) {
		if ctx.Err() == nil { // the node still waits
			s.loud.Do(func() { s.o.Log.Error("gcp_iit cannot attest nodes now", "error", err) })
		}
		return nil, attestors.ErrUnavailable
	}
	return e, err
}

func (s *Server) verify(ctx context.Context, payload []byte) (*attestors.Evidence, error) {
	if len(payload) > maxToken {
		return nil, fmt.Errorf("gcp_iit payload is %d bytes long; the most is %d", len(payload), maxToken)
	}
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	token, err := s.google.Validate(ctx, string(payload))
	if err != nil {
		return nil, fmt.Errorf("identity token: %w", err)
	}
	i, err := parseInstance(token.Claims)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(s.c.ProjectIDAllowList, i.ProjectID) {
		return nil, fmt.Errorf("instances of the project %s may not attest here", i.ProjectID)
	}
	values := []string{"project-id:" + i.ProjectID, "zone:" + i.Zone, "instance-name:" + i.Name}
	if i.email != "" {
		values = append(values, "sa:"+i.email)
	}
	if s.compute != nil {
		if err := s.running.Acquire(ctx, 1); err != nil {
			return nil, unavailable{fmt.Errorf("%d earlier attestations are not finished", maxRunning)}
		}
		defer s.running.Release(1)
		more, err := s.compute.describe(ctx, i)
		if err != nil {
			return nil, err
		}
		values = append(values, more...)
	}
	path, err := s.template.Path(pathData{
		Name, i.ProjectID, i.ProjectNumber.String(), i.Zone, i.ID, i.Name, i.Created.String(), strings.ReplaceAll(i.email, "@", "_"),
	})
	if err != nil {
		return nil, fmt.Errorf("instance does not fit the agent_path_template: %w", err)
	}
	return &attestors.Evidence{
		Path:        path,
		Selectors:   attestors.SelectorsOf(Name, values),
		CanReattest: s.c.AllowReattestation,
		Once:        !s.c.AllowReattestation,
	}, nil
}
