package kube

import (
	encoding "encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"

	"github.com/goccy/go-yaml"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

// serviceAccount is where a pod finds what it reaches the API server with.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount/"

const defaultPort = "443"

// InCluster is how a pod reaches the API server of its cluster.
func InCluster() (Config, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return Config{}, errors.New("this is no pod: KUBERNETES_SERVICE_HOST is not set; name a kubeconfig")
	}
	return Config{
		Address: net.JoinHostPort(host, port),
		CA:      Source{Path: serviceAccount + "ca.crt"},
		Token:   Source{Path: serviceAccount + "token"},
	}, nil
}

// kubeconfig is what matters of one: not what would run programs.
type kubeconfig struct {
	CurrentContext string `yaml:"current-context"`
	Contexts       []struct {
		Name    string `yaml:"name"`
		Context struct {
			Cluster string `yaml:"cluster"`
			User    string `yaml:"user"`
		} `yaml:"context"`
	} `yaml:"contexts"`
	Clusters []struct {
		Name    string        `yaml:"name"`
		Cluster configCluster `yaml:"cluster"`
	} `yaml:"clusters"`
	Users []struct {
		Name string     `yaml:"name"`
		User configUser `yaml:"user"`
	} `yaml:"users"`
}

type configCluster struct {
	Server     string `yaml:"server"`
	ServerName string `yaml:"tls-server-name"`
	CAPath     string `yaml:"certificate-authority"`
	CA         base64 `yaml:"certificate-authority-data"`
	Insecure   bool   `yaml:"insecure-skip-tls-verify"`
	Proxy      string `yaml:"proxy-url"`
}

type configUser struct {
	Token           string `yaml:"token"`
	TokenPath       string `yaml:"tokenFile"`
	CertificatePath string `yaml:"client-certificate"`
	Certificate     base64 `yaml:"client-certificate-data"`
	KeyPath         string `yaml:"client-key"`
	Key             base64 `yaml:"client-key-data"`
	Exec            any    `yaml:"exec"`
	AuthProvider    any    `yaml:"auth-provider"`
	Username        string `yaml:"username"`
}

// Kubeconfig reads how to reach an API server from a file as kubectl has it: its
// current context. What the file holds is read now, the files that it names when
// they are needed.
func Kubeconfig(path string) (Config, error) {
	data, err := pemfile.Read(path, maxFile)
	if err != nil {
		return Config{}, err
	}
	c, err := parseKubeconfig(data, filepath.Dir(path))
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func parseKubeconfig(data []byte, dir string) (Config, error) {
	var k kubeconfig
	if err := yaml.Unmarshal(data, &k); err != nil {
		return Config{}, errors.New("it is no kubeconfig: malformed YAML") // the parser's own error quotes the line, with the secret in it
	}
	var cluster *configCluster
	var user *configUser
	for _, context := range k.Contexts {
		if context.Name != k.CurrentContext {
			continue
		}
		for i := range k.Clusters {
			if k.Clusters[i].Name == context.Context.Cluster {
				cluster = &k.Clusters[i].Cluster
			}
		}
		for i := range k.Users {
			if k.Users[i].Name == context.Context.User {
				user = &k.Users[i].User
			}
		}
	}
	switch {
	case cluster == nil || user == nil:
		return Config{}, fmt.Errorf("its current-context is %q, which names no cluster and user that are in it", k.CurrentContext)
	case cluster.Insecure:
		return Config{}, errors.New("insecure-skip-tls-verify is not supported; give certificate-authority-data")
	case cluster.Proxy != "":
		return Config{}, errors.New("proxy-url is not supported; give an address that can be reached")
	case user.Exec != nil || user.AuthProvider != nil || user.Username != "":
		return Config{}, errors.New("its user has an exec, auth-provider or password; give it a token, a tokenFile or a client certificate")
	}
	u, err := url.Parse(cluster.Server)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" {
		return Config{}, fmt.Errorf("its server is %q; it has to be like https://host:6443", cluster.Server)
	}
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	if len(u.Path) > 0 && u.Path[len(u.Path)-1] == '/' {
		u.Path = u.Path[:len(u.Path)-1]
	}
	c := Config{
		Address:     net.JoinHostPort(u.Hostname(), port),
		Path:        u.EscapedPath(),
		ServerName:  cluster.ServerName,
		CA:          source(dir, cluster.CAPath, cluster.CA),
		Token:       source(dir, user.TokenPath, []byte(user.Token)),
		Certificate: source(dir, user.CertificatePath, user.Certificate),
		Key:         source(dir, user.KeyPath, user.Key),
	}
	switch {
	case c.CA.Empty():
		return Config{}, errors.New("its cluster has no certificate-authority")
	case c.Certificate.Empty() != c.Key.Empty():
		return Config{}, errors.New("its user has a client certificate or its key, but not both")
	case c.Token.Empty() && c.Certificate.Empty():
		return Config{}, errors.New("its user has neither a token nor a client certificate")
	}
	return c, nil
}

// source prefers what is in the kubeconfig, as kubectl does; paths are relative
// to it.
func source(dir, path string, data []byte) Source {
	if len(data) > 0 {
		return Source{Data: data}
	}
	if path != "" && !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	return Source{Path: path}
}

// base64 is a text of base64, decoded.
type base64 []byte

func (b *base64) UnmarshalYAML(text []byte) error {
	var s string
	if err := yaml.Unmarshal(text, &s); err != nil {
		return err
	}
	data, err := encoding.StdEncoding.DecodeString(s)
	*b = data
	return err
}
